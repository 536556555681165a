"""Captures a module with ``torch.export``, for one call of one of its methods.

The result is a graph of pre-dispatch ATen operators (``aten.linear``, ``aten.layer_norm``,
``aten.scaled_dot_product_attention``, ``aten.view`` ...). Every tensor enters through a
placeholder, parameters included, and every node carries a fake value in ``meta["val"]``. The
backend of ``torch.compile`` works on graphs of the same dialect (``dynamo.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from tomepass.capture.captured import Capture, gradients_wanted
from tomepass.capture.dialect import placeholders, spell_out, to_dialect, written_input
from tomepass.capture.fidelity import NotCapturedError, called_once, can_be_held, hold_against
from tomepass.capture.regions import regions_in_place, traced_by_dynamo
from tomepass.errors import NotCaptured, TomeError, first_lines
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.origin import source_line
from tomepass.model.alone import Untraced, one_at_a_time
from tomepass.model.batches import Form, forms
from tomepass.model.calls import call_with, describe_inputs
from tomepass.model.checkpointing import marking
from tomepass.model.fast_paths import refuse_skipped_modules
from tomepass.model.guards import Guards
from tomepass.model.twin import Reads, Twin

aten = torch.ops.aten

_FUSED = (
    aten._transformer_encoder_layer_fwd.default,
    aten._native_multi_head_attention.default,
)


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
        raise NotCaptured(
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
    to_dialect(module)
    if traced_by_dynamo(module):
        twin.unseen = True
        twin.modes.everything()
    guards = Guards(model, twin.reads, twin.edited, _has_fused_layer(module), twin.modes)
    if (written := written_input(module)) is not None:
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
    for node, spec in zip(*placeholders(module), signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(node.meta.get("val"), Tensor):
                data.add(node.name)
            continue
        target = cast(str, spec.target)
        if spec.kind is InputKind.PARAMETER:
            learned.add(node.name)
        if target in constants and not _owns(model, _path(target)):
            constant = _constant(cast(Tensor, constants[target]))
            spell_out(node, constant)
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


def _owns(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return isinstance(getattr(model.get_submodule(owner), name, None), Tensor)
    except AttributeError:
        return False


def _constant(value: Tensor) -> Tensor:
    # Made in inference mode it could never be part of a backward: a copy can.
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_lines(error)}"
