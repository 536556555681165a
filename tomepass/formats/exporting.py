"""The entry `tomepass.export`: makes an ``ExportedProgram`` of plain ATen, free of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tomepass.errors import NotExported, TomeError, no_foreign_errors
from tomepass.handover.applied import make_applied
from tomepass.handover.choices import Outputs, check_choices
from tomepass.handover.merged import MergedModel, call_of, of_one_graph
from tomepass.handover.refusing import check_model
from tomepass.handover.standing_in.wrapping import SHARED
from tomepass.kernels.written_out import FOR_RUNTIMES
from tomepass.methods import Method, MethodLike, RLike
from tomepass.methods.asked import resolve_method
from tomepass.model.batches import ANY, Form
from tomepass.model.calls import call_with
from tomepass.ops.library import COMPOSITES
from tomepass.sources.examples import example_inputs as inputs_from_config

# Runtimes convert no reduction into places that several tokens go to, or convert it differently.
_PLAIN = ("aten", "prims")


_WITHOUT_CONVERTER = ("aten::scatter_reduce", "aten::index_reduce")

# Names files and classes of the machine that exported; no runtime reads them.
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


@no_foreign_errors("export the model")
def export(
    model: nn.Module,
    method: MethodLike | None = None,
    *,
    r: RLike | None = None,
    keep_rate: float | None = None,
    macs: float | None = None,
    speedup: float | None = None,
    example_inputs: Any = None,
    dynamic_batch: bool = True,
    outputs: Outputs | None = None,
) -> ExportedProgram:
    """The merged model as a ``torch.export.ExportedProgram`` of functional ATen operators alone.

    ``torch.export.save`` writes it to a file that loads and runs where tomepass and transformers
    are not installed. It takes tensors by the model's own names, and returns a dict where the
    model returns a ``ModelOutput``.

    Args:
        model: in eval mode; or an applied one, whose method is taken unless another is given.
        method: what to do, for example ``ToMe(r=8)``, or a plan. Default ``ToMe()``, r=16.
        r: short for ``method=ToMe(r=r)``, as the next three are for ``ToMe`` with them.
        keep_rate: the share of the tokens to keep at a quarter, a half and three quarters.
        macs: the share of the multiply-accumulates to keep.
        speedup: how many times as many there are unmerged.
        example_inputs: a tensor, a tuple or a dict of inputs: their resolution is the one that is
            exported. Default: made from ``model.config``.
        dynamic_batch: any batch size; False fixes that of the example inputs.
        outputs: as in :func:`tomepass.apply`. Default: those of an applied model, or "original".

    Returns:
        the program; ``program.module()`` runs it.

    Raises:
        TomeError: if the model cannot be merged or captured, is in training mode, or holds an
            operator that runtimes have no converter for.
        TypeError, ValueError: on a wrong ``r`` or target, or more than one of them and ``method``
            given.
    """
    standing = None
    if isinstance(model, MergedModel):
        standing = model._tome.method
        if of_one_graph(model) and outputs is None:
            outputs = model._tome.outputs
        model = model._tome.model
    method = resolve_method(
        method, r, keep_rate=keep_rate, macs=macs, speedup=speedup, standing=standing
    )
    outputs = "original" if outputs is None else outputs
    check_choices("raise", outputs)
    check_model(model)
    _check_exportable(model, method, dynamic_batch)
    call = call_of(model, inputs_from_config(model) if example_inputs is None else example_inputs)
    applied = make_applied(model, method, call, "raise", outputs)
    form = applied.capture.form
    if dynamic_batch and form.size is not None:
        raise NotExported(
            "a program for any batch size cannot be made: the model is "
            f"{applied.capture.notes[-1]}",
            advice=f"export with dynamic_batch=False, for a batch of {form.size}; or once for each "
            "batch size, with example_inputs= of that size",
        )

    def run(call: dict[str, Any]) -> Any:
        return applied.run(model, _leaves(call))

    return _program(model, call, form if dynamic_batch else None, run)


@no_foreign_errors("export the model")
def export_unmerged(
    model: nn.Module, *, example_inputs: Any = None, dynamic_batch: bool = True
) -> ExportedProgram:
    """The model as it is, exported the way :func:`export` does: what to measure against."""
    check_model(model)
    call = call_of(model, inputs_from_config(model) if example_inputs is None else example_inputs)
    form = ANY if dynamic_batch else None
    return _program(model, call, form, lambda call: call_with(model, call))


def operators(program: ExportedProgram) -> dict[str, int]:
    """How often each operator stands in a program, by its name."""
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            found[str(node.target)] = found.get(str(node.target), 0) + 1
    return dict(sorted(found.items()))


def _check_exportable(model: nn.Module, method: Method, dynamic_batch: object) -> None:
    if not isinstance(dynamic_batch, bool):
        raise NotExported(
            "the batch alone can be dynamic: a merge counts the tokens there are, so the "
            f"resolution is fixed; got dynamic_batch={dynamic_batch!r}",
            advice="export once for each resolution, with example_inputs= of that size, and give "
            "dynamic_batch=True or False",
        )
    if method.adaptive is not False:
        raise NotExported(
            f"{method!r} routes images to several graphs, a program is one",
            advice="export each budget: tomepass.export(model, merged.tome.budgets[0].tome.method)",
        )
    if method.trace_source:
        raise NotExported(
            "a program returns the model's outputs alone, and no source map",
            advice=f"export with {method.replace(trace_source=False)!r}",
        )
    if any(module.training for module in model.modules()):
        raise NotExported(
            "the model is in training mode: its dropout would be exported",
            advice="call model.eval() first",
        )


class _Subject(nn.Module):
    """The model's state under the model's names, with a forward of the names of one call."""

    run: Callable[[dict[str, Any]], Any]
    fixed: dict[str, Any]

    def __init__(
        self, model: nn.Module, run: Callable[[dict[str, Any]], Any], fixed: dict[str, Any]
    ) -> None:
        super().__init__()
        self.__dict__.update({name: model.__dict__[name] for name in SHARED})
        self.__dict__.update(run=run, fixed=fixed)

    def forward(self, **call: Any) -> Any:
        """What the model returns, in containers that load anywhere."""
        return _plain(self.run({**call, **self.fixed}))


def _program(
    model: nn.Module, call: dict[str, Any], form: Form | None, run: Callable[[dict[str, Any]], Any]
) -> ExportedProgram:
    """A program for a batch that is open as a form says; None fixes it."""
    given = {name: value for name, value in call.items() if _leaves(value, Tensor)}
    fixed = {name: value for name, value in call.items() if name not in given}
    subject = _Subject(model, lambda call: run({name: call[name] for name in order}), fixed)
    order = list(call)
    shapes = None
    if form is not None:
        given, shapes = form.remade(given)
    # torch.export names inputs, and finds their dynamic sizes, by the signature.
    subject.forward = _with_signature(subject.forward, given)  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            program = torch.export.export(subject, (), given, dynamic_shapes=shapes, strict=False)
            # Hardly more than our own is decomposed: runtimes have kernels for attention and norms.
            program = program.run_decompositions({**COMPOSITES, **FOR_RUNTIMES})
    except TomeError:
        raise
    except Exception as error:
        lines = " ".join(str(error).strip().splitlines()[:3])[:500]
        raise NotExported(
            f"{type(model).__name__} could not be exported: {type(error).__name__}: {lines}",
            advice="try dynamic_batch=False, or another version of torch",
        ) from error
    _check_operators(program)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for name in _TRACES:
                node.meta.pop(name, None)
    return cast(ExportedProgram, program)


def _check_operators(program: ExportedProgram) -> None:
    """Refuses what a runtime has no converter for."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name, schema = str(target.name()), target._schema  # type: ignore[no-untyped-call]
            if schema.name in _WITHOUT_CONVERTER:
                why = "it reduces into places that several values go to, which has no converter"
            elif schema.is_mutable:
                why = "it writes in place"
            elif target.namespace in _PLAIN:
                continue
            else:
                why = "it is not an operator of PyTorch's own"
        elif isinstance(target, torch._ops.OperatorBase):
            name, why = str(target), "it is not an operator of PyTorch's own"
        else:
            continue  # arithmetic on sizes
        raise NotExported(
            f"{name} cannot be exported: {why}",
            node=node.name,
            advice="choose another method or option, for example combine='weighted_mean'",
        )


def _with_signature(forward: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(**dict(zip(names, args, strict=False)), **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    named.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return named


def _plain(value: Any) -> Any:
    """Outputs as dicts, lists and tuples: a ``ModelOutput`` loads only beside transformers."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part) for part in value) if _bare(value) else value
    return value


def _bare(value: Any) -> bool:
    return type(value) in (list, tuple)


def _leaves(value: Any, kind: type = object) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, kind)]
