"""Stage 1: one dialect of graph from both doors.

The dialect is pre-dispatch ATen (``aten.linear``, ``aten.layer_norm``,
``aten.scaled_dot_product_attention``, ``aten.view`` ...) in which every tensor enters through a
placeholder, parameters included, and every node carries a fake value in ``meta["val"]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource, LocalSource
from torch._guards import Source, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from tomepass.alone import Untraced, one_at_a_time
from tomepass.batches import ANY, Form, forms
from tomepass.calls import call_with
from tomepass.checkpointing import is_reentrant, marking
from tomepass.clone import Reads, Twin
from tomepass.decompositions import DECOMPOSITIONS
from tomepass.errors import TomeError, first_lines
from tomepass.fast_paths import refuse_skipped_modules
from tomepass.fidelity import NotCapturedError, called_once, can_be_held, hold_against
from tomepass.guards import Guards
from tomepass.masks import drop_idle_masks
from tomepass.regions import Inlining, regions_in_place, traced_by_dynamo
from tomepass.subexpressions import merge_duplicates

aten = torch.ops.aten

# Where a node comes from.
_ORIGIN = ("stack_trace", "nn_module_stack")
# What says to AOTAutograd that a node may be computed again in the backward.
_CHECKPOINTED = ("recompute", "ac_graph_id")
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
_FUSED = (
    aten._transformer_encoder_layer_fwd.default,
    aten._native_multi_head_attention.default,
)
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
        guards: whether the model still is what was captured.
        form: how it takes the batch.
        grad: whether gradients were enabled.
        wanted: which inputs wanted gradients, where the model asks.
        closed: why the batch is not open, or the first tensor alone is batched.
        uncompared: why it could not be compared with the model.
    """

    graph: CanonicalGraph
    state: tuple[str | Tensor, ...]
    out_spec: pytree.TreeSpec
    example: tuple[Any, ...]
    guards: Guards
    form: Form = ANY
    grad: bool = True
    wanted: tuple[bool, ...] | None = None
    closed: str | None = None
    uncompared: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it, in words."""
        notes = [] if self.uncompared is None else [self.uncompared]
        if self.form.size is not None:
            notes.append(
                f"captured for a batch of {self.form.size} alone, since torch.export cannot leave "
                f"the batch open ({self.closed}): every other batch size is a capture of its own"
            )
        return tuple(notes)

    def stands_for(self, call: dict[str, Any]) -> bool:
        """Is the model what it was, and are the inputs what it asked of them?"""
        asked = self.wanted is None or self.wanted == gradients_wanted(call)
        return asked and self.guards.hold()

    @classmethod
    def of_nothing(cls, guards: Guards) -> Capture:
        """What stands in the place of a capture where none can be made: a graph of nothing."""
        graph = fx.Graph()
        graph.output(())
        empty = CanonicalGraph(fx.GraphModule(nn.Module(), graph), frozenset(), fragment=False)
        return cls(empty, (), pytree.tree_structure(()), (), guards)


def gradients_wanted(inputs: Any) -> tuple[bool, ...]:
    """Which of the tensors among some inputs want gradients."""
    return tuple(v.requires_grad for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor))


def capture_module(model: nn.Module, kwargs: dict[str, Any], forward: str = "forward") -> Capture:
    """Exports a method of ``model`` for keyword inputs like ``kwargs``, with a dynamic batch.

    Tensors whose first dimension equals that of the first tensor are batched; the example is
    remade with a batch of 2, since a batch of 1 would be baked into the graph. Where that cannot
    be done, the first tensor alone is batched, or the graph is made for this batch size alone.

    Raises:
        NotCapturedError: if ``torch.export`` cannot capture the model.
        TomeError: if there is no tensor, or if the model writes to its own state.
    """
    _check_place(model, kwargs)
    refuse_skipped_modules(model)
    failed: list[tuple[Exception, Twin]] = []
    with one_at_a_time():
        for form in forms(kwargs):
            example, dynamic = form.remade(kwargs)
            twin = Twin(model)
            try:
                program = _exported(model, twin, forward, example, dynamic)
            except Exception as error:
                failed.append((error, twin))
                continue
            if kept := [(reads, reads.kept) for reads in twin.reads if reads.kept]:
                later = called_once(model, forward, example)
                again = _exported(model, later, forward, example, dynamic)
                _check_state(model, program, again, kept)
            captured = _captured(model, program, twin, tuple(pytree.tree_leaves(example)), form)
            if failed:
                captured = replace(captured, closed=_told(failed[0][0]))
            if can_be_held(kwargs):
                unlike = hold_against(model, captured, kwargs, forward)
                captured = replace(captured, uncompared=unlike)
            return captured
    first, twin = failed[0]
    if isinstance(first, TomeError):
        raise first
    raise NotCapturedError(
        f"torch.export could not capture {type(model).__name__} for inputs "
        f"{describe_inputs(kwargs)}: {type(first).__name__}: {first_lines(first)}",
        advice="call the model itself with these inputs first; if that works, the model "
        "branches on tensor values, which no graph can hold",
        guards=Guards(model, twin.reads, twin.edited, modes=twin.modes),
    ) from first


def _exported(
    model: nn.Module, twin: Twin, method: str, example: dict[str, Any], dynamic: dict[str, Any]
) -> torch.export.ExportedProgram:
    with marking(model):
        return torch.export.export(
            _ByKeyword(twin, method), (example,), dynamic_shapes=(dynamic,), strict=False
        )


def _check_state(
    model: nn.Module,
    first: torch.export.ExportedProgram,
    second: torch.export.ExportedProgram,
    kept: list[tuple[Reads, dict[str, Any]]],
) -> None:
    """Refuses a model whose second call is another than its first; a mere counter is forgotten."""
    if first.graph_module.code != second.graph_module.code:
        names = sorted(name for _, values in kept for name in values)
        raise NotCapturedError(
            f"the model keeps state from call to call in {', '.join(names)}, on which what it "
            "computes depends",
            advice="keep it in an input, or call the model so that it computes the same each time",
            guards=Guards(model, [reads for reads, _ in kept]),
        )
    for reads, values in kept:
        for name in values:
            del reads.names[name]


def _check_place(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses a model whose parameters are brought from elsewhere while it runs."""
    given = [v for v in pytree.tree_leaves(kwargs) if isinstance(v, Tensor)]
    held = [name for name, value in model.named_parameters() if value.is_meta]
    if held and not all(value.is_meta for value in given):
        raise TomeError(
            f"parameters of {type(model).__name__} are on the meta device ({held[0]} is the first "
            f"of {len(held)}) and its inputs are not: their values are elsewhere, and hooks bring "
            "them while its parts run, as accelerate does when it offloads; a graph reads all at "
            "once",
            advice="load the model whole, without device_map= or offloading, then apply",
        )


def _captured(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    twin: Twin,
    example: tuple[Any, ...],
    form: Form,
) -> Capture:
    """An exported program in the dialect, with its state named after the model's."""
    module, signature = program.graph_module, program.graph_signature
    _to_dialect(module)
    if traced_by_dynamo(module):
        twin.unseen = True
        twin.modes.everything()
    guards = Guards(model, twin.reads, twin.edited, _has_fused_layer(module), twin.modes)
    if (written := _written_input(module)) is not None:
        raise NotCapturedError(
            "the model writes to its inputs or its own state in its forward",
            node=written.name,
            source=source_line(written),
            advice="switch it to eval mode",
            guards=guards,
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
    grad = torch.is_grad_enabled()
    wanted = gradients_wanted(example) if twin.modes.gradients else None
    return Capture(
        graph, tuple(state), program.call_spec.out_spec, example, guards, form, grad, wanted
    )


def capture_dynamo(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    decompositions: Mapping[Any, Any] = DECOMPOSITIONS,
) -> CanonicalGraph:
    """Re-traces a Dynamo graph into the dialect; placeholders keep their order and metadata.

    Args:
        decompositions: what is written out: operators, and functions that are traced instead.
    """
    if (replaced := _replaced_data(gm)) is not None:
        raise TomeError(
            "the model replaces the data of its own parameters in its forward",
            node=replaced.name,
            source=source_line(replaced),
            advice="fold what it adds to its weights into them first, as merge_and_unload() of a "
            "model with adapters does",
        )
    mode = detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_as_fake(mode, value) for value in example_inputs]
    allowed = mode.allow_non_fake_inputs
    # Inductor's freezing hands over real constants instead of parameters.
    mode.allow_non_fake_inputs = True
    try:
        with mode, fx_traceback.preserve_node_meta():
            traced = make_fx(
                Inlining(gm).run,
                decomposition_table=dict(decompositions),
                pre_dispatch=True,
                _allow_non_fake_inputs=True,
            )(*fakes)
    finally:
        mode.allow_non_fake_inputs = allowed
    data, learned = set(), set()
    for old, new, value in zip(*_placeholders(gm, traced), example_inputs, strict=True):
        new.meta.update({k: old.meta[k] for k in _CARRIED_META if k in old.meta})
        state = isinstance(value, Tensor) and _is_state(value, old)
        if isinstance(value, Tensor) and value.ndim and not state:
            data.add(new.name)
        if isinstance(value, nn.Parameter) and state:
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
    carried = (*_ORIGIN, *_CHECKPOINTED)
    new.meta.update({name: like.meta[name] for name in carried if name in like.meta})


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

    def __init__(self, twin: Twin, method: str) -> None:
        super().__init__()
        self.model = twin.model
        self.method = method
        self.twin = twin
        self.untraced = Untraced.now()

    def forward(self, call: dict[str, Any]) -> Any:
        # A forward is called as the module is: with its hooks.
        called = self.model if self.method == "forward" else getattr(self.model, self.method)
        with self.untraced.elsewhere(), regions_in_place(), self.twin.noting():
            return call_with(called, call)


def _has_fused_layer(module: fx.GraphModule) -> bool:
    """PyTorch fuses encoder layers and attention only where nothing needs gradients."""
    return any(node.target in _FUSED for node in module.graph.nodes)


def _path(target: str) -> str:
    """The model's own name for an attribute of its wrapper."""
    return target.removeprefix("model.")


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
    inner = cast(fx.GraphModule, module.get_submodule(body.target)).graph
    # Reentrant checkpoints run without gradients, and again with them in the backward.
    without_gradients = at == 1 and arguments[0] is False and not is_reentrant(inner.nodes)
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
    if value.ndim or value.is_meta or not isinstance(number := value.item(), (bool, int, float)):
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


def _is_state(value: Tensor, placeholder: fx.Node) -> bool:
    """Is it the model's, and not one of the inputs it is called with?"""
    source = getattr(placeholder, "_dynamo_source", None)
    if isinstance(value, nn.Parameter):
        return not (isinstance(source, LocalSource) and source.is_input)
    # Dynamo marks a module's buffers as static inputs; users mark inputs of theirs too.
    marked = hasattr(value, "_dynamo_static_input_type")
    return marked and (source is None or _in_a_module(source))


def _replaced_data(gm: fx.GraphModule) -> fx.Node | None:
    """Where a Dynamo graph assigns to a tensor's ``data``."""
    return next((n for n in gm.graph.nodes if n.target is Tensor.set_), None)


def _in_a_module(source: Source) -> bool:
    """Does Dynamo read it off a module?"""
    kind: Any = source.guard_source
    kind = kind() if callable(kind) else kind  # a method in some versions
    return "MODULE" in kind.name


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_lines(error)}"
