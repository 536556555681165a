"""Stage 1: one dialect of graph from both doors.

The dialect is pre-dispatch ATen (``aten.linear``, ``aten.layer_norm``,
``aten.scaled_dot_product_attention``, ``aten.view`` ...) in which every tensor enters through a
placeholder, parameters included, and every node carries a fake value in ``meta["val"]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from tomepass.errors import TomeError

# What Dynamo leaves on a placeholder and Inductor needs: static inputs, CUDA graphs, names.
_CARRIED_META = ("_dynamo_source", "tensor_dict", "grapharg", "stack_trace", "nn_module_stack")
# Checks on the input's metadata: our captures are keyed by what they check.
_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)


@dataclass(frozen=True)
class CanonicalGraph:
    """A captured graph, every tensor a placeholder.

    Args:
        module: the graph; placeholders in the order of the call.
        data: names of the placeholders that hold the user's inputs, not the model's state.
        fragment: True if the graph may be a piece of a larger model (the Dynamo door).
    """

    module: fx.GraphModule
    data: frozenset[str]
    fragment: bool

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode in which the nodes' values live."""
        values = [n.meta["val"] for n in self.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        mode = detect_fake_mode(values)
        assert mode is not None
        return cast(FakeTensorMode, mode)


@dataclass(frozen=True)
class Capture:
    """A model captured through ``torch.export`` for one call signature.

    Args:
        graph: the canonical graph.
        state: for each leading placeholder, the model's attribute path or the tensor itself
            (a constant the model does not own).
        out_spec: rebuilds the model's output class from the graph's flat outputs.
        example: the flat example inputs the capture was made with.
    """

    graph: CanonicalGraph
    state: tuple[str | Tensor, ...]
    out_spec: pytree.TreeSpec
    example: tuple[Any, ...]


def capture_module(model: nn.Module, kwargs: dict[str, Any]) -> Capture:
    """Exports ``model`` for keyword inputs like ``kwargs``, with a dynamic batch.

    Tensors whose first dimension equals that of the first tensor are batched; the example is
    remade with a batch of 2, since a batch of 1 would be baked into the graph.

    Raises:
        TomeError: if ``torch.export`` cannot capture the model.
    """
    example, dynamic = _batch_of_two(kwargs)
    try:
        program = torch.export.export(
            model, (), example, dynamic_shapes=dynamic, strict=False
        )
    except TomeError:
        raise
    except Exception as error:
        raise TomeError(
            f"torch.export could not capture {type(model).__name__} for inputs "
            f"{describe_inputs(kwargs)}: {type(error).__name__}: {_first_lines(error)}",
            advice="call the model itself with these inputs first; if that works, the model "
            "branches on tensor values, which no graph can hold",
        ) from error
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise TomeError(
            f"the model changes its own state in the forward: {', '.join(changed)}",
            advice="switch it to eval mode",
        )
    module = program.graph_module
    _drop_assertions(module)
    constants = program.constants
    state: list[str | Tensor] = []
    data = set()
    for spec in signature.input_specs:
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
            data.add(getattr(spec.arg, "name", ""))
        elif spec.target in constants and not _owns(model, cast(str, spec.target)):
            state.append(cast(Tensor, constants[spec.target]))
        else:
            state.append(cast(str, spec.target))
    graph = CanonicalGraph(module, _tensor_names(module, data), fragment=False)
    assert program.call_spec.out_spec is not None
    return Capture(graph, tuple(state), program.call_spec.out_spec, tuple(pytree.tree_leaves(example)))


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CanonicalGraph:
    """Re-traces a Dynamo graph into the dialect; placeholders keep their order and metadata."""
    mode = detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    mode = cast(FakeTensorMode, mode)
    fakes = [_as_fake(mode, value) for value in example_inputs]
    allowed = mode.allow_non_fake_inputs
    # Inductor's freezing hands over real constants instead of parameters.
    mode.allow_non_fake_inputs = True
    try:
        with mode, fx_traceback.preserve_node_meta():
            traced = make_fx(
                fx.Interpreter(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True
            )(*fakes)
    finally:
        mode.allow_non_fake_inputs = allowed
    before = gm.graph.find_nodes(op="placeholder")
    after = traced.graph.find_nodes(op="placeholder")
    data = set()
    for old, new, value in zip(before, after, example_inputs, strict=True):
        new.meta.update({k: old.meta[k] for k in _CARRIED_META if k in old.meta})
        if isinstance(value, Tensor) and value.ndim and not _is_state(value):
            data.add(new.name)
    traced.meta.update(gm.meta)
    _drop_assertions(traced)
    return CanonicalGraph(traced, frozenset(data), fragment=True)


def describe_inputs(kwargs: dict[str, Any]) -> str:
    """``pixel_values float32[2, 3, 224, 224], labels int64[2]``."""
    parts = []
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            parts.append(f"{name} {dtype}{list(value.shape)}")
        elif value is not None:
            parts.append(f"{name}={value!r}")
    return ", ".join(parts)


def source_line(node: fx.Node) -> str | None:
    """The model's source line behind a node, ``file.py:216: code``, torch's own frames skipped."""
    trace = node.meta.get("stack_trace") or node.meta.get("custom", {}).get("stack_trace")
    if not trace:
        return None
    frames = [line.strip() for line in trace.splitlines() if line.strip()]
    located = [
        (frame, frames[i + 1] if i + 1 < len(frames) else "")
        for i, frame in enumerate(frames)
        if frame.startswith("File ")
    ]
    own = [pair for pair in located if "/torch/" not in pair[0].split(",")[0]]
    frame, code = (own or located)[-1]
    parts = frame.split(", ")
    path = parts[0].removeprefix("File ").strip('"')
    line = parts[1].removeprefix("line ") if len(parts) > 1 else "?"
    if ", code: " in frame:
        code = frame.split(", code: ", 1)[1]
    return f"{'/'.join(path.split('/')[-2:])}:{line}: {code}"


def _batch_of_two(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = [v for v in pytree.tree_leaves(kwargs) if isinstance(v, Tensor) and v.ndim]
    if not tensors:
        raise TomeError("no tensor among the inputs, so there is no batch to capture with")
    batch = tensors[0].shape[0]
    dimension = torch.export.Dim("batch", min=1)

    def two(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != batch:
            return value
        if batch == 0:
            return value.new_zeros((2, *value.shape[1:]))
        return torch.cat([value[:1], value[-1:]]).detach()

    def batched(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: dimension} if value.ndim and value.shape[0] == batch else {}
        return None

    return pytree.tree_map(two, kwargs), pytree.tree_map(batched, kwargs)


def _drop_assertions(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            module.graph.erase_node(node)
    module.recompile()


def _owns(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return isinstance(getattr(model.get_submodule(owner), name, None), Tensor)
    except AttributeError:
        return False


def _tensor_names(module: fx.GraphModule, names: set[str]) -> frozenset[str]:
    placeholders = module.graph.find_nodes(op="placeholder")
    return frozenset(
        n.name for n in placeholders if n.name in names and isinstance(n.meta.get("val"), Tensor)
    )


def _as_fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value)
    return value


def _is_state(value: Tensor) -> bool:
    # Dynamo marks a module's parameters and buffers as static inputs.
    return isinstance(value, nn.Parameter) or hasattr(value, "_dynamo_static_input_type")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:3])[:500]
