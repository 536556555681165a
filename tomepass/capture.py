"""Stage 1: one dialect of graph from both doors.

The dialect is pre-dispatch ATen (``aten.linear``, ``aten.layer_norm``,
``aten.scaled_dot_product_attention``, ``aten.view`` ...) in which every tensor enters through a
placeholder, parameters included, and every node carries a fake value in ``meta["val"]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from tomepass.decompositions import DECOMPOSITIONS
from tomepass.errors import TomeError
from tomepass.masks import drop_idle_masks
from tomepass.subexpressions import merge_duplicates

aten = torch.ops.aten

# Where a node comes from.
_ORIGIN = ("stack_trace", "nn_module_stack")
_VALUES = ("val", "example_value")  # ours, and Dynamo's
# What Dynamo leaves on a placeholder and Inductor needs: static inputs, CUDA graphs, names.
_CARRIED_META = ("tensor_dict", "grapharg", *_ORIGIN)
# Where a line of code is not the model's.
_NOT_THE_MODEL = tuple(f'"{Path(file).parent}/' for file in (torch.__file__, __file__))
# Checks on the input's metadata: our captures are keyed by what they check.
_ASSERTIONS = (aten._assert_tensor_metadata.default,)
_CONCATENATIONS = (aten.concat.default, aten.concatenate.default)
# Regions under a mode of their own, and which argument is their body.
_REGIONS: dict[Any, int] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}
# Cuts a constant off autograd: in place, but no values change.
_DETACH = torch.ops.aten.detach_.default


@dataclass(frozen=True)
class CanonicalGraph:
    """A captured graph, every tensor a placeholder.

    Args:
        module: the graph; placeholders in the order of the call.
        data: names of the placeholders that hold the user's inputs, not the model's state.
        learned: names of those that hold parameters.
        fragment: True if the graph may be a piece of a larger model (the Dynamo door).
    """

    module: fx.GraphModule
    data: frozenset[str]
    fragment: bool
    learned: frozenset[str] = frozenset()

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
        return mode


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
    example, dynamic = batch_of_two(kwargs)
    try:
        program = torch.export.export(
            _ByKeyword(model), (example,), dynamic_shapes=(dynamic,), strict=False
        )
    except TomeError:
        raise
    except Exception as error:
        raise TomeError(
            f"torch.export could not capture {type(model).__name__} for inputs "
            f"{describe_inputs(kwargs)}: {type(error).__name__}: {_first_lines(error)}",
            advice="call the model itself with these inputs first; if that works, the model "
            "branches on tensor values, which no graph can hold, or reads the batch size as a "
            "Python number: x.shape[0] stays symbolic where len(x) does not",
        ) from error
    module, signature = program.graph_module, program.graph_signature
    _to_dialect(module)
    if (written := _written_input(module)) is not None:
        raise TomeError(
            "the model writes to its inputs or its own state in its forward",
            node=written.name,
            source=source_line(written),
            advice="switch it to eval mode",
        )
    constants = program.constants
    state: list[str | Tensor] = []
    data, learned = set(), set()
    for node, spec in zip(*_placeholders(module), signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(node.meta.get("val"), Tensor):
                data.add(node.name)
            continue
        target = cast(str, spec.target)
        if spec.kind is InputKind.PARAMETER:
            learned.add(node.name)
        if target in constants and not _owns(model, _path(target)):
            constant = _constant(cast(Tensor, constants[target]))
            _spell_out(node, constant)
            state.append(constant)
        else:
            state.append(_path(target))
    module.recompile()
    graph = CanonicalGraph(module, frozenset(data), False, frozenset(learned))
    assert program.call_spec.out_spec is not None
    leaves = tuple(pytree.tree_leaves(example))
    return Capture(graph, tuple(state), program.call_spec.out_spec, leaves)


def capture_dynamo(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    decompositions: Mapping[Any, Any] = DECOMPOSITIONS,
) -> CanonicalGraph:
    """Re-traces a Dynamo graph into the dialect; placeholders keep their order and metadata.

    Args:
        decompositions: what is written out: operators, and functions that are traced instead.
    """
    mode = detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_as_fake(mode, value) for value in example_inputs]
    allowed = mode.allow_non_fake_inputs
    # Inductor's freezing hands over real constants instead of parameters.
    mode.allow_non_fake_inputs = True
    try:
        with mode, fx_traceback.preserve_node_meta():
            traced = make_fx(
                fx.Interpreter(gm).run,
                decomposition_table=dict(decompositions),
                pre_dispatch=True,
                _allow_non_fake_inputs=True,
            )(*fakes)
    finally:
        mode.allow_non_fake_inputs = allowed
    data, learned = set(), set()
    for old, new, value in zip(*_placeholders(gm, traced), example_inputs, strict=True):
        new.meta.update({k: old.meta[k] for k in _CARRIED_META if k in old.meta})
        if isinstance(value, Tensor) and value.ndim and not _is_state(value):
            data.add(new.name)
        if isinstance(value, nn.Parameter):
            learned.add(new.name)
    _to_dialect(traced)
    return CanonicalGraph(traced, frozenset(data), True, frozenset(learned))


def carry_marks(gm: fx.GraphModule, rewritten: fx.GraphModule) -> fx.GraphModule:
    """Puts what Dynamo left beside its graph on the graph rewritten from it, and returns that.

    AOTAutograd reads off it which inputs are parameters; CUDA graphs copy all the others.
    """
    rewritten.meta.update(gm.meta)
    for old, new in zip(*_placeholders(gm, rewritten), strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    # With Inductor's freezing the parameters are constants in the graph, under new names.
    if hasattr(gm, "_param_name_to_source") and not any(True for _ in rewritten.parameters()):
        sources: Any = gm._param_name_to_source
        own = {name: ConstantSource(name) for name, _ in rewritten.named_buffers()}
        rewritten._param_name_to_source = own | sources
    return rewritten


def fix_sizes(
    captured: CanonicalGraph, gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> CanonicalGraph:
    """Fixes all sizes of the user's inputs but the batch: a merge counts the tokens there are.

    Reading a symbolic size installs Dynamo's guard on it, so another resolution is another graph.
    """
    inputs = captured.graph.find_nodes(op="placeholder")
    sizes = [size for n in inputs if n.name in captured.data for size in n.meta["val"].shape[1:]]
    symbolic = [int(size) for size in sizes if isinstance(size, torch.SymInt)]
    return capture_dynamo(gm, example_inputs) if symbolic else captured


def describe_inputs(kwargs: dict[str, Any]) -> str:
    """``pixel_values float32[2, 3, 224, 224], labels int64[2], return_dict=False``."""
    return ", ".join(
        f"{name} {_described(v)}" if isinstance(v, Tensor) else f"{name}={_described(v)}"
        for name, v in kwargs.items()
        if v is not None
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    return f"{{{describe_inputs(value)}}}" if isinstance(value, dict) else repr(value)


def carry_origin(new: fx.Node, like: fx.Node) -> None:
    """Marks a node as coming from where another does: its source line and its module."""
    new.meta.update({name: like.meta[name] for name in _ORIGIN if name in like.meta})


def value_of(node: Any) -> Any:
    """The fake value of a node of a captured graph, or of one of Dynamo's."""
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def carry_value(new: fx.Node, old: fx.Node) -> None:
    """Gives a node the fake value of the one it stands for."""
    new.meta.update({name: old.meta[name] for name in _VALUES if name in old.meta})


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
    own = [pair for pair in located if not any(home in pair[0] for home in _NOT_THE_MODEL)]
    frame, code = (own or located)[-1]
    parts = frame.split(", ")
    path = parts[0].removeprefix("File ").strip('"')
    line = parts[1].removeprefix("line ") if len(parts) > 1 else "?"
    if ", code: " in frame:
        code = frame.split(", code: ", 1)[1]
    return f"{'/'.join(path.split('/')[-2:])}:{line}: {code}"


class _ByKeyword(nn.Module):
    """A model that takes its keyword inputs in one dict.

    torch.export cannot tell shapes apart from inputs that fall into a forward's ``**kwargs``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: dict[str, Any]) -> Any:
        return self.model(**call)


def _path(target: str) -> str:
    """The model's own name for an attribute of its wrapper."""
    return target.removeprefix("model.")


def batch_of_two(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs remade with a batch of 2, and their dynamic shapes for ``torch.export``."""
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


def _to_dialect(module: fx.GraphModule) -> None:
    """Drops assertions on metadata; inlines regions; spells every concatenation ``aten.cat``."""
    while regions := [n for n in module.graph.nodes if n.target in _REGIONS]:
        _inline(module, regions[0])
    for node in list(module.graph.nodes):
        if node.target in _ASSERTIONS:
            module.graph.erase_node(node)
        elif node.target is aten.hstack.default and node.meta["val"].ndim > 1:
            node.target, node.args = aten.cat.default, (node.args[0], 1)
        elif node.target in _CONCATENATIONS:
            node.target = aten.cat.default
    merge_duplicates(module)
    drop_idle_masks(module)
    module.recompile()


def _inline(module: fx.GraphModule, region: fx.Node) -> None:
    """Puts a region under another gradient or autocast mode in its place.

    What leaves a region without gradients is cut off autograd. What autocast casts stands in the
    graph as operators of its own.
    """
    arguments: list[Any] = list(region.args)
    at = _REGIONS[region.target]
    body, *operands = arguments[at:]
    without_gradients = at == 1 and arguments[0] is False
    inner = cast(fx.GraphModule, module.get_submodule(body.target)).graph
    placed = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    results: Any = ()
    with module.graph.inserting_before(region):
        for node in inner.nodes:
            if node.op == "output":
                results = node.args[0]
            elif node.op != "placeholder":
                placed[node] = module.graph.node_copy(node, lambda n: placed[n])
        for taken in list(region.users):
            result = placed[results[int(cast(int, taken.args[1]))]]
            if without_gradients and isinstance(result.meta.get("val"), Tensor):
                value = result.meta["val"]
                result = module.graph.call_function(aten.detach.default, (result,))
                result.meta["val"] = value
            taken.replace_all_uses_with(result)
            module.graph.erase_node(taken)
    module.graph.erase_node(region)


def _spell_out(literal: fx.Node, value: Tensor) -> None:
    """Makes a number written ``torch.tensor(0.0)`` a number in the graph, for masks to be read."""
    if value.ndim or not isinstance(number := value.item(), (bool, int, float)):
        return
    for copy in [n for n in literal.users if n.target is aten.lift_fresh_copy.default]:
        with copy.graph.inserting_before(copy):
            kwargs: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            made = copy.graph.call_function(aten.full.default, ([], number), kwargs)
        made.meta = dict(copy.meta)
        for same in [n for n in copy.users if n.target is _DETACH]:
            same.replace_all_uses_with(copy)
            copy.graph.erase_node(same)
        copy.replace_all_uses_with(made)
        copy.graph.erase_node(copy)


def _owns(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return isinstance(getattr(model.get_submodule(owner), name, None), Tensor)
    except AttributeError:
        return False


def _placeholders(*modules: fx.GraphModule) -> list[list[fx.Node]]:
    return [module.graph.find_nodes(op="placeholder") for module in modules]


def _written_input(module: fx.GraphModule) -> fx.Node | None:
    """A node that changes what it was given in place: a parameter, a buffer, the user's input."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            schema = getattr(node.target, "_schema", None)
            if schema is None or not schema.is_mutable or node.target is _DETACH:
                continue
            for argument, value in zip(schema.arguments, node.args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and _viewed(value).op == "placeholder":
                    return node  # type: ignore[no-any-return]
    return None


def _viewed(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views and in-place operators shares."""
    while schema := getattr(node.target, "_schema", None):
        if not schema.returns or schema.returns[0].alias_info is None:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _constant(value: Tensor) -> Tensor:
    # Made in inference mode it could never be part of a backward: a copy can.
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value


def _as_fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value)
    if isinstance(value, torch.SymInt) and (fixed := value.node.maybe_as_int()) is not None:
        return fixed
    return value


def _is_state(value: Tensor) -> bool:
    # Dynamo marks a module's parameters and buffers as static inputs.
    return isinstance(value, nn.Parameter) or hasattr(value, "_dynamo_static_input_type")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:3])[:500]
