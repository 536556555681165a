"""Gradient checkpointing: what the model recomputes in its backward, the merged model does too.

Which operators a model runs under ``torch.utils.checkpoint`` is seen while it is captured: the
call stands on the stack. Nodes carry a mark, and the rewritten graph runs each marked stretch
under ``torch.utils.checkpoint`` itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode

_MARK = "tomepass_checkpoint"

_REENTRANT = "tomepass_checkpoint_reentrant"


def _code_of(function: Any) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code


_CHECKPOINT = _code_of(torch.utils.checkpoint.checkpoint)


@contextmanager
def marking(model: nn.Module) -> Iterator[None]:
    """While a model is captured: marks what it runs under ``torch.utils.checkpoint``."""
    if not any(module.training for module in model.modules()):
        yield
        return
    mode = _Marking()
    try:
        with fx_traceback.preserve_node_meta(), mode:
            yield
    finally:
        mode.calls.clear()


class _Marking(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        # Frames are kept until the capture is done, so that their ids are their own.
        self.calls: dict[int, tuple[int, FrameType]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (frame := _checkpointing()) is None:
            return func(*args, **kwargs)
        number, _ = self.calls.setdefault(id(frame), (len(self.calls), frame))
        marks = {_MARK: number}
        if frame.f_locals.get("use_reentrant"):
            marks[_REENTRANT] = 1
        with fx_traceback.annotate(marks):
            return func(*args, **kwargs)


def _checkpointing() -> FrameType | None:
    """The outermost call of ``checkpoint`` on the stack."""
    found, frame = None, cast(FrameType | None, sys._getframe(2))
    while frame is not None:
        if frame.f_code is _CHECKPOINT:
            found = frame
        frame = frame.f_back
    return found


def is_reentrant(nodes: Iterable[fx.Node]) -> bool:
    """Whether nodes ran under ``use_reentrant=True``, which turns gradients off as it runs."""
    return any(_REENTRANT in node.meta.get("custom", {}) for node in nodes)


def recomputing(module: fx.GraphModule) -> fx.GraphModule | None:
    """A copy that runs each marked stretch under checkpoint; None if there is none."""
    stretches = _stretches(module)
    if not stretches:
        return None
    graph = fx.Graph()
    root = dict(module.named_children())
    copies: dict[fx.Node, fx.Node] = {}
    nodes, at = list(module.graph.nodes), 0
    parts: dict[str, Any] = {}
    for first, last in [*stretches, (len(nodes), len(nodes))]:
        for node in nodes[at:first]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if first < len(nodes):
            inside = nodes[first : last + 1]
            name = f"stretch_{len(parts)}"
            parts[name] = _stretch(module, inside, graph, copies, name)
        at = last + 1
    made = fx.GraphModule({**_attributes(module), **root, **parts}, graph)
    return made


def _stretch(
    module: fx.GraphModule,
    inside: Sequence[fx.Node],
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    name: str,
) -> fx.GraphModule:
    """A graph of some nodes, and in the graph around it its call."""
    own = set(inside)
    used = [n for node in inside for n in node.all_input_nodes if n not in own]
    given = list(dict.fromkeys(used))
    results = [node for node in inside if any(user not in own for user in node.users)]
    body = fx.Graph()
    within: dict[fx.Node, fx.Node] = {n: body.placeholder(n.name) for n in given}
    for node in inside:
        within[node] = body.node_copy(node, within.__getitem__)
    body.output(tuple(within[n] for n in results))
    part = graph.get_attr(name)
    call = graph.call_function(_recompute, (part, *(copies[n] for n in given)))
    for place, node in enumerate(results):
        copies[node] = graph.call_function(_result, (call, place))
    return fx.GraphModule(module, body)


def _recompute(part: fx.GraphModule, *inputs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(part, *inputs, use_reentrant=False)


def _result(results: Sequence[Any], place: int) -> Any:
    return results[place]


def _attributes(module: fx.GraphModule) -> dict[str, Tensor]:
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}


def _stretches(module: fx.GraphModule) -> list[tuple[int, int]]:
    """First and last places of the nodes of each checkpoint, in order, none in another."""
    places: dict[int, list[int]] = {}
    for place, node in enumerate(module.graph.nodes):
        mark = node.meta.get("custom", {}).get(_MARK)
        if mark is not None and node.op == "call_function":
            places.setdefault(mark, []).append(place)
    found: list[tuple[int, int]] = []
    for first, last in sorted((min(p), max(p)) for p in places.values()):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found
