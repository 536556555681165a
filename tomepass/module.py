"""The first door: ``apply`` wraps a model; the wrapper runs rewritten graphs of it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.capture import Capture, capture_module
from tomepass.config import RLike, ToMe, resolve_method
from tomepass.errors import TomeError
from tomepass.examples import example_inputs as inputs_from_config
from tomepass.planning import plan_graph
from tomepass.report import Report, make_report
from tomepass.rewrite import Rewritten, rewrite

OnUnmatched = Literal["raise", "warn"]
Outputs = Literal["original", "merged"]


def apply(
    model: nn.Module,
    method: ToMe | None = None,
    *,
    r: RLike | None = None,
    example_inputs: Any = None,
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
) -> MergedModel:
    """A module that computes what ``model`` computes, with redundant tokens merged.

    The model itself is not changed; its parameters are shared, as with ``torch.compile``.

    Args:
        model: any encoder; HuggingFace vision and audio models need nothing more.
        method: what to do, for example ``ToMe(r=8)``. Default ``ToMe()``, r=16.
        r: short for ``method=ToMe(r=r)``.
        example_inputs: a tensor, a tuple or a dict of inputs to capture ahead. Default: made
            from ``model.config`` where that says enough, else captured on first use.
        on_unmatched: ``"raise"`` a TomeError on a model that cannot be merged, or ``"warn"`` and
            run it unmerged.
        outputs: ``"original"`` returns token sequences unmerged, at their original length;
            ``"merged"`` returns the short ones.

    Raises:
        TomeError: if the model cannot be merged exactly, with block, node, source line, reason.
        TypeError, ValueError: on a wrong ``r``, or ``method`` and ``r`` both given.
    """
    method = resolve_method(method, r)
    _one_of("on_unmatched", on_unmatched, ("raise", "warn"))
    _one_of("outputs", outputs, ("original", "merged"))
    if isinstance(model, MergedModel):
        raise TomeError(
            f"the model is already merged with {model.method!r}",
            advice="apply tomepass to the original model",
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    merged = _rebuild(model, method, on_unmatched, outputs)
    if example_inputs is not None:
        merged.prepare(example_inputs)
    else:
        try:
            inputs = inputs_from_config(model)
        except TomeError:
            return merged  # captured on first use
        merged.prepare(inputs)
    return merged


def explain(
    model: nn.Module,
    method: ToMe | None = None,
    *,
    r: RLike | None = None,
    example_inputs: Any = None,
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
) -> Report:
    """What would be merged, why not the rest, and what it saves. Takes what :func:`apply` takes.

    Never raises on a mismatch: the report holds it.

    Raises:
        TomeError: if there are no example inputs and the config does not say what to make.
        TypeError, ValueError: on a wrong ``r``, or ``method`` and ``r`` both given.
    """
    method = resolve_method(method, r)
    _one_of("on_unmatched", on_unmatched, ("raise", "warn"))
    _one_of("outputs", outputs, ("original", "merged"))
    if isinstance(model, MergedModel):
        model = model.original
    merged = _rebuild(model, method, "warn", outputs)
    inputs = inputs_from_config(model) if example_inputs is None else example_inputs
    return merged.report(inputs)


class MergedModel(nn.Module):
    """A model with merging applied; see :func:`apply`, which makes it.

    It shares the parameters, buffers and submodules of the model, so ``state_dict()``,
    ``to()``, ``train()`` and the rest act on both. What it adds lives beside them: one
    rewritten graph for each call signature, resolution and dtype.
    """

    method: ToMe

    def __init__(
        self, model: nn.Module, method: ToMe, on_unmatched: OnUnmatched, outputs: Outputs
    ) -> None:
        super().__init__()
        # The very dictionaries of the model: one module tree, seen through two objects.
        shared = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
        self.__dict__.update({name: model.__dict__[name] for name in shared})
        self.__dict__["original"] = model
        self.__dict__.update(method=method, on_unmatched=on_unmatched, outputs=outputs)
        self.__dict__["_captures"] = {}
        self.__dict__["_names"] = _parameter_names(model)

    # ---- running ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs for the model's own inputs, at any batch size."""
        call = self._bind(args, kwargs)
        applied = self._captures.get(self._signature(call))
        if applied is None:
            if torch.compiler.is_compiling():
                raise TomeError(
                    "this call signature was not captured before compiling, and a capture "
                    "inside a compiled region is impossible",
                    advice="call merged.prepare(inputs) with inputs like these first",
                )
            applied = self._prepare(call)
        if applied.graph is None:
            return self.original(**call)
        return applied.run(self.original, pytree.tree_leaves(call))

    def prepare(self, inputs: Any) -> MergedModel:
        """Captures and rewrites ahead of the first call with inputs like these.

        Args:
            inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

        Returns:
            itself.
        """
        call = self._bind(*_as_call(inputs))
        if self._signature(call) not in self._captures:
            self._prepare(call)
        return self

    def source(self, *args: Any, **kwargs: Any) -> Tensor:
        """The final token of every original token: ``[B, N]`` indices into the merged sequence.

        Takes the model's inputs; needs ``trace_source=True`` in the method.
        """
        if not self.method.trace_source:
            raise TomeError(
                "the source map is not traced",
                advice=f"apply with {self.method.replace(trace_source=True)!r}",
            )
        call = self._bind(args, kwargs)
        applied = self._captures.get(self._signature(call)) or self._prepare(call)
        if applied.source_graph is None:
            raise TomeError("nothing merges in this model, so there is no source map")
        (source,) = applied.run(
            self.original, pytree.tree_leaves(call), graph=applied.source_graph
        )
        return source

    def report(self, inputs: Any) -> Report:
        """What was read off the graph for inputs like these, and done."""
        return self.captured(inputs).report

    def captured(self, inputs: Any) -> Applied:
        """The rewritten graph for inputs like these, made if it is not there yet."""
        call = self._bind(*_as_call(inputs))
        return self._captures.get(self._signature(call)) or self._prepare(call)

    def bind(self, inputs: Any) -> dict[str, Any]:
        """Inputs in the shapes :meth:`prepare` takes them, as keyword inputs of the model."""
        return self._bind(*_as_call(inputs))

    def _prepare(self, call: dict[str, Any]) -> Applied:
        applied = make_applied(
            self.original, self.method, call, self.on_unmatched, self.outputs
        )
        self._captures[self._signature(call)] = applied
        return applied

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Positional and keyword inputs as keywords, in the order of the model's signature."""
        names = self._names
        if len(args) > len(names):
            raise TypeError(
                f"{type(self.original).__name__} takes at most {len(names)} positional inputs, "
                f"got {len(args)}"
            )
        given = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name in given:
                raise TypeError(f"input {name!r} was given twice, by position and by name")
        given.update(kwargs)
        ordered = {name: given.pop(name) for name in names if name in given}
        ordered.update(given)
        return {name: value for name, value in ordered.items() if value is not None}

    def _signature(self, call: dict[str, Any]) -> tuple[Any, ...]:
        leaves = pytree.tree_leaves(call)
        batch = next((v.shape[0] for v in leaves if isinstance(v, Tensor) and v.ndim), 0)
        state = next(self.original.parameters(), None)
        mode = (
            self.original.training,
            None if state is None else (state.dtype, state.device.type, state.device.index),
        )
        return (mode, tuple(call), tuple(_leaf_signature(v, batch) for v in leaves))

    # ---- being the model -------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Captures are made again where they are needed.
        return _rebuild, (self.original, self.method, self.on_unmatched, self.outputs)

    def _apply(self, fn: Any, recurse: bool = True) -> MergedModel:
        self.original._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> MergedModel:
        """Sets training mode, of the model too."""
        self.original.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.original.load_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"merged by tomepass with {self.method!r}"


@dataclass(frozen=True)
class Applied:
    """A model rewritten for one call signature.

    Args:
        capture: the graph as captured and where its state comes from.
        rewritten: the rewritten graph, None where the model is left as it is.
        source_graph: the same, returning the source map alone.
        report: what was found and done.
    """

    capture: Capture
    rewritten: Rewritten | None
    source_graph: fx.GraphModule | None
    report: Report

    @property
    def graph(self) -> fx.GraphModule | None:
        """The graph that runs."""
        return None if self.rewritten is None else self.rewritten.module

    def run(
        self, model: nn.Module, leaves: Iterable[Any], graph: fx.GraphModule | None = None
    ) -> Any:
        """Runs a graph on the model's current parameters; the model's graph by default."""
        values = [*read_state(model, self.capture), *leaves]
        if graph is not None:
            return graph(*values)
        assert self.graph is not None
        return pytree.tree_unflatten(list(self.graph(*values)), self.capture.out_spec)


def make_applied(
    model: nn.Module,
    method: ToMe,
    call: dict[str, Any],
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
) -> Applied:
    """Captures, plans and rewrites a model for keyword inputs like ``call``."""
    capture = capture_module(model, call)
    planned = plan_graph(capture.graph, method)
    rewritten, refused = None, None
    if planned.streams:
        try:
            rewritten = rewrite(capture.graph, planned, outputs=outputs)
        except TomeError as error:
            refused = error
    report = make_report(type(model).__name__, capture.graph, planned, rewritten, refused)
    if rewritten is None:
        refusal = report.refusal()
        if on_unmatched == "raise":
            raise refusal
        warnings.warn(f"left unmerged: {refusal}", stacklevel=4)
    source_graph = None
    if method.trace_source and rewritten is not None and rewritten.source is not None:
        source_graph = only_output(rewritten.module, rewritten.source)
    return Applied(capture, rewritten, source_graph, report)


def read_state(model: nn.Module, capture: Capture) -> list[Tensor]:
    """The parameters and buffers a capture needs, as the model holds them now."""
    return [path if isinstance(path, Tensor) else _attribute(model, path) for path in capture.state]


def only_output(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """A copy of a graph that returns one of its nodes alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.name == name:
                wanted = copies[node]
    graph.output((wanted,))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _rebuild(
    model: nn.Module, method: ToMe, on_unmatched: OnUnmatched, outputs: Outputs
) -> MergedModel:
    return _class_like(type(model))(model, method, on_unmatched, outputs)


@functools.cache
def _class_like(cls: type[nn.Module]) -> type[MergedModel]:
    # HuggingFace pipelines look a model's class up by its name.
    return type(cls.__name__, (MergedModel,), {"__doc__": MergedModel.__doc__})


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value  # type: ignore[no-any-return]


def _parameter_names(model: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def _leaf_signature(value: Any, batch: int) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    batched = value.ndim > 0 and value.shape[0] == batch
    sizes = value.shape[1:] if batched else value.shape
    device = (value.device.type, value.device.index)
    return (batched, tuple(int(s) for s in sizes), value.dtype, device)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), inputs
    raise TypeError(
        "inputs must be a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"got {type(inputs).__name__}"
    )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


