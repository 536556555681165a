"""The first door: ``apply`` wraps a model; the wrapper runs rewritten graphs of it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.alone import exporting
from tomepass.attention_paths import take_fastest_attention
from tomepass.bypass import captured_another, merging
from tomepass.calls import Inputs, as_call, call_with, check_call
from tomepass.capture import Capture, capture_module, describe_inputs
from tomepass.captures import CAPTURES, Captures, Check, Make
from tomepass.checkpointing import recomputing
from tomepass.errors import TomeError, no_foreign_errors
from tomepass.examples import example_inputs as inputs_from_config
from tomepass.fidelity import NotCapturedError, hold_against
from tomepass.graphs import copied, only_outputs
from tomepass.kept import Counting, KeptReport
from tomepass.kernels.choose import on_cuda, take_kernels
from tomepass.methods import Method, RLike, ToMe, resolve_method
from tomepass.parallel import refuse_sharded
from tomepass.planning import PlannedStream, plan_graph
from tomepass.report import Report, make_report
from tomepass.rewrite import Rewritten, rewrite
from tomepass.standin import StandIn, Tome, gives_way, shadowed, stand_in

if TYPE_CHECKING:
    from tomepass.adaptive import Router

OnUnmatched = Literal["raise", "warn"]
Outputs = Literal["original", "merged"]


@no_foreign_errors("apply itself to the model")
def apply(
    model: nn.Module,
    method: Method | None = None,
    *,
    r: RLike | None = None,
    example_inputs: Any = None,
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
    captures: int = CAPTURES,
) -> Any:
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
        captures: how many rewritten graphs are kept, one for each resolution, dtype, set of
            options and state of the model (and batch size, where the batch cannot be left open);
            beyond it the one longest out of use is made anew when it is needed.

    Returns:
        a :class:`MergedModel`; an :class:`tomepass.adaptive.AdaptiveModel` where the method is
        adaptive.

    Raises:
        TomeError: if the model cannot be merged exactly, with block, node, source line, reason.
        TypeError, ValueError: on a wrong ``r``, or ``method`` and ``r`` both given.
    """
    method = resolve_method(method, r)
    check_choices(on_unmatched, outputs)
    check_limit(captures)
    if isinstance(model, MergedModel):
        raise TomeError(
            f"the model is already merged with {model._tome.method!r}",
            advice="apply tomepass to the original model",
        )
    check_model(model)
    if method.adaptive is not False:
        from tomepass.adaptive import make_adaptive

        return make_adaptive(model, method, example_inputs, on_unmatched, outputs, captures)
    merged = _rebuild(model, method, on_unmatched, outputs, captures)
    if names := shadowed(merged):
        warn_of_names(merged, names)
    if example_inputs is not None:
        captured(merged, example_inputs)
    else:
        try:
            inputs = inputs_from_config(model)
        except TomeError:
            return merged  # captured on first use
        captured(merged, inputs)
    return merged


@no_foreign_errors("explain the model")
def explain(
    model: nn.Module,
    method: Method | None = None,
    *,
    r: RLike | None = None,
    example_inputs: Any = None,
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
    captures: int = CAPTURES,
) -> Report:
    """What would be merged, why not the rest, and what it saves. Takes what :func:`apply` takes.

    Never raises on a mismatch: the report holds it. An applied module is explained as it is
    unless another method is given.

    Raises:
        TomeError: if torch.export cannot capture the model, or if there are no example inputs
            and the config does not say what to make, or if the method or model is adaptive.
        TypeError, ValueError: on a wrong ``r``, or ``method`` and ``r`` both given.
    """
    if isinstance(model, MergedModel):
        method = model._tome.method if method is None and r is None else method
        model = model._tome.model
    method = resolve_method(method, r)
    check_choices(on_unmatched, outputs)
    check_model(model)
    check_one_graph(method, "explain")
    check_limit(captures)
    inputs = inputs_from_config(model) if example_inputs is None else example_inputs
    call = call_of(model, inputs)
    return _told_of_limit(_analyse(model, method, call, outputs), captures)


class MergedModel(StandIn):
    """A model with merging applied; see :func:`apply`, which makes it.

    It stands in for the model: attributes, class, parameters, buffers and submodules are the
    model's, so ``state_dict()``, ``to()``, ``train()`` and the rest act on both. What it adds lives
    beside them: one rewritten graph for each call signature, resolution, dtype and mode, of the
    forward and of methods that attend on their own.

    Where the model has an attribute named as one of ours is (``source``, ``method``), it is the
    model's; ``MergedModel.source(merged, x)`` is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        on_unmatched: OnUnmatched,
        outputs: Outputs,
        captures: Captures | int = CAPTURES,
    ) -> None:
        if isinstance(captures, int):
            make = _maker(method, on_unmatched, outputs)
            captures = Captures(make, checker(method, on_unmatched), captures)
        super().__init__(Tome(model, method, on_unmatched, outputs, captures))

    # ---- running ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs for the model's own inputs, at any batch size."""
        return self._tome_answer(self._tome.bind(args, kwargs), "forward")

    def _tome_answer(self, call: dict[str, Any], method: str) -> Any:
        tome = self._tome
        applied = tome.captures.get(tome.model, call, method)
        if torch.compiler.is_dynamo_compiling():
            return applied.answer(tome.model, call, method)
        with merging():
            return applied.answer(tome.model, call, method)

    def _tome_called(self, call: dict[str, Any], method: str) -> Any:
        """Like its answer; a forward is called as the module is, compiled if that is compiled."""
        return call_with(self, call) if method == "forward" else self._tome_answer(call, method)

    def _tome_remade(self) -> tuple[Any, tuple[Any, ...]]:
        tome = self._tome
        kept = tome.captures.limit
        return _rebuild, (tome.model, tome.method, tome.on_unmatched, tome.outputs, kept)

    def _tome_prepare(self, inputs: Any) -> None:
        captured(self, inputs)

    @gives_way
    def source(self, *args: Any, **kwargs: Any) -> Tensor:
        """The final token of every original token: ``[B, N]`` indices into the merged sequence.

        Takes the model's inputs; needs ``trace_source=True`` in the method.
        """
        tome = self._tome
        if not tome.method.trace_source:
            raise TomeError(
                "the source map is not traced",
                advice=f"apply with {tome.method.replace(trace_source=True)!r}",
            )
        call = tome.bind(args, kwargs)
        applied = tome.captures.get(tome.model, call)
        if applied.graph is None:
            raise TomeError("this model is left unmerged, so there is no source map")
        leaves = pytree.tree_leaves(call)
        if applied.source_graph is not None:
            (source,) = applied.run(tome.model, leaves, graph=applied.source_graph)
            return source  # type: ignore[no-any-return]
        first, stream = _first_tensor(call), applied.report.streams[0]
        assert first is not None
        assert not any(block.r for block in stream.blocks), "merges without a source map"
        # Nothing merges: every token is its own.
        return torch.arange(stream.tokens, device=first.device).expand(first.shape[0], -1)

    @gives_way
    def kept(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens in use after each block of the first stream, for each image: ``[B, blocks]``.

        Takes the model's inputs. Padding and places out of use do not count.

        Raises:
            TomeError: if the model is left unmerged.
        """
        tome = self._tome
        call = tome.bind(args, kwargs)
        applied = tome.captures.get(tome.model, call)
        if applied.graph is None:
            raise TomeError("this model is left unmerged, so no block loses a token")
        state = read_state(tome.model, applied.capture)
        return applied.counting.counts(state, pytree.tree_leaves(call))

    @gives_way
    def kept_report(self, inputs: Any) -> KeptReport:
        """The distribution of :meth:`kept` over the images of inputs like those it takes."""
        args, kwargs = as_call(inputs)
        kept = MergedModel.kept(self, *args, **kwargs)
        (stream, *_) = captured(self, inputs).report.streams
        return KeptReport.of(type(self._tome.model).__name__, self._tome.method, stream, kept)

    @gives_way
    def report(self, inputs: Any) -> Report:
        """What was read off the graph for inputs like these, and done."""
        return _told_of_limit(captured(self, inputs), self._tome.captures.limit)

    @gives_way
    def captured(self, inputs: Any) -> Applied:
        """The rewritten graph for inputs like these, made if it is not there yet."""
        return captured(self, inputs)

    @gives_way
    def bind(self, inputs: Any) -> dict[str, Any]:
        """Inputs in the shapes :meth:`prepare` takes them, as keyword inputs of the model."""
        return self._tome.call_of(inputs)


def captured(merged: MergedModel, inputs: Any) -> Applied:
    """The rewritten graph of a merged model for inputs like these, made if it is not there."""
    tome = merged._tome
    return tome.captures.get(tome.model, tome.call_of(inputs))


@dataclass(frozen=True)
class Applied:
    """A model rewritten for one call signature.

    Args:
        capture: the graph as captured and where its state comes from.
        rewritten: the rewritten graph, None where the model is left as it is.
        source_graph: the same, returning the source map alone.
        report: what was found and done.
        on_device: the graph with kernels for its device, where there are some that run anywhere
            but in an exported program.
        recomputed: the graph that runs where gradients are wanted, where the model recomputes
            parts of itself in its backward (gradient checkpointing).
    """

    capture: Capture
    rewritten: Rewritten | None
    source_graph: fx.GraphModule | None
    report: Report
    on_device: fx.GraphModule | None = None
    recomputed: fx.GraphModule | None = None

    @property
    def graph(self) -> fx.GraphModule | None:
        """The graph in composite operators, which is what is exported."""
        return None if self.rewritten is None else self.rewritten.module

    @functools.cached_property
    def router(self) -> Router:
        """What tells how redundant an image is, made when it is asked for."""
        from tomepass.adaptive import Router

        return Router.of(self.capture)

    @functools.cached_property
    def counting(self) -> Counting:
        """A graph that counts tokens, made when it is asked for."""
        return Counting.of(self.capture, self.report.method)

    def answer(self, model: nn.Module, call: dict[str, Any], method: str) -> Any:
        """What a method of the model gives for a call, merged if it can be."""
        if self.graph is None:
            return call_with(model if method == "forward" else getattr(model, method), call)
        return self.run(model, pytree.tree_leaves(call))

    def run(
        self, model: nn.Module, leaves: Iterable[Any], graph: fx.GraphModule | None = None
    ) -> Any:
        """Runs a graph on the model's current parameters; the model's graph by default."""
        values = [*read_state(model, self.capture), *leaves]
        if graph is not None:
            return graph(*values)
        own = self.graph
        if self.on_device is not None and not exporting():
            own = self.on_device
        if self.recomputed is not None and torch.is_grad_enabled():
            own = self.recomputed
        assert own is not None
        return pytree.tree_unflatten(list(own(*values)), self.capture.out_spec)


@no_foreign_errors("merge the model for these inputs")
def make_applied(
    model: nn.Module,
    method: Method,
    call: dict[str, Any],
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
    forward: str = "forward",
) -> Applied:
    """Captures, plans and rewrites a model for keyword inputs like ``call``.

    Args:
        forward: the name of the model's method that takes them.

    Raises:
        TomeError: if it cannot be captured, or is refused and ``on_unmatched`` is ``"raise"``.
    """
    try:
        applied = _analyse(model, method, call, outputs, forward)
    except NotCapturedError as error:
        if on_unmatched == "raise":
            raise
        applied = _not_captured(model, method, call, error)
    return accepted(applied, on_unmatched)


def accepted(applied: Applied, on_unmatched: OnUnmatched) -> Applied:
    """What was made of a model, unless it is refused.

    Raises:
        TomeError: if it is refused and ``on_unmatched`` is ``"raise"``; ``"warn"`` warns.
    """
    if applied.graph is None:
        refusal = applied.report.refusal()
        if on_unmatched == "raise":
            raise refusal
        warnings.warn(f"left unmerged: {refusal}", stacklevel=5)
    return applied


def _not_captured(
    model: nn.Module, method: Method, call: dict[str, Any], error: NotCapturedError
) -> Applied:
    """A model that is left as it is, since no graph can stand for it."""
    report = Report.of_nothing(type(model).__name__, describe_inputs(call), method, error)
    return Applied(Capture.of_nothing(error.guards), None, None, report)


def _maker(method: Method, on_unmatched: OnUnmatched, outputs: Outputs) -> Make:
    def make(model: nn.Module, call: dict[str, Any], forward: str) -> Applied:
        captured_another()
        return make_applied(model, method, call, on_unmatched, outputs, forward)

    return make


def checker(method: Method, on_unmatched: OnUnmatched) -> Check:
    def check(applied: Applied, model: nn.Module, call: dict[str, Any], forward: str) -> Applied:
        if applied.graph is None:
            return applied  # then the model itself runs
        try:
            unlike = hold_against(model, applied.capture, call, forward)
        except NotCapturedError as error:
            if on_unmatched == "raise":
                raise
            warnings.warn(f"left unmerged: {error}", stacklevel=4)
            return _not_captured(model, method, call, error)
        if unlike == applied.capture.uncompared:
            return applied
        capture = replace(applied.capture, uncompared=unlike)
        return replace(
            applied, capture=capture, report=replace(applied.report, notes=capture.notes)
        )

    return check


def _analyse(
    model: nn.Module,
    method: Method,
    call: dict[str, Any],
    outputs: Outputs,
    forward: str = "forward",
) -> Applied:
    return apply_capture(model, capture_module(model, call, forward), method, outputs)


def apply_capture(
    model: nn.Module, capture: Capture, method: Method, outputs: Outputs = "original"
) -> Applied:
    """Plans and rewrites a captured model; what is refused, the report says."""
    planned = plan_graph(capture.graph, method)
    rewritten, refused = None, None
    if planned.streams:
        try:
            rewritten = rewrite(capture.graph, planned, outputs=outputs)
        except TomeError as error:
            refused = error
    report = make_report(type(model).__name__, capture.graph, planned, rewritten, refused)
    report = replace(report, notes=capture.notes)
    if rewritten is not None:
        paths = take_fastest_attention(rewritten.module, capture.graph.fake_mode)
        report = replace(report, paths=paths)
    on_device = None
    if rewritten is not None and on_cuda(rewritten.module):
        on_device = copied(rewritten.module)
        taken = take_kernels(on_device)
        report = replace(report, kernels=taken.kernels, paths=taken.paths or report.paths)
    source_graph = None
    if method.trace_source and rewritten is not None and rewritten.source is not None:
        source_graph = only_outputs(rewritten.module, [rewritten.source])
    recomputed = None if rewritten is None else recomputing(on_device or rewritten.module)
    return Applied(capture, rewritten, source_graph, report, on_device, recomputed)


def call_of(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Inputs in the shapes :meth:`MergedModel.prepare` takes them, as a model's keyword inputs."""
    call = Inputs.of(model).bind(*as_call(inputs))
    check_call(call, type(model).__name__)
    return call


def read_streams(
    model: nn.Module, call: dict[str, Any]
) -> tuple[Capture, tuple[PlannedStream, ...]]:
    """A model as captured, and its streams of tokens, nothing reduced yet.

    Raises:
        TomeError: if it cannot be captured, or is refused.
    """
    capture = capture_module(model, call)
    streams = plan_graph(capture.graph, ToMe(0)).streams
    if not streams:
        raise apply_capture(model, capture, ToMe(0)).report.refusal()
    return capture, streams


def read_state(model: nn.Module, capture: Capture) -> list[Tensor]:
    """The parameters and buffers a capture needs, as the model holds them now."""
    return [path if isinstance(path, Tensor) else _attribute(model, path) for path in capture.state]


def _rebuild(
    model: nn.Module,
    method: Method,
    on_unmatched: OnUnmatched,
    outputs: Outputs,
    captures: int = CAPTURES,
) -> MergedModel:
    cls = stand_in(MergedModel, model)
    made: MergedModel = cls(model, method, on_unmatched, outputs, captures)
    return made


def _told_of_limit(applied: Applied, captures: int) -> Report:
    """A report that says how many captures are kept, where each batch size needs one."""
    report = applied.report
    if applied.capture.form.size is None:
        return report
    told = f"{captures} captures are kept: captures= of tomepass.apply"
    return replace(report, notes=(*report.notes, told))


def warn_of_names(merged: StandIn, names: list[str]) -> None:
    """Says which names of ours are the model's."""
    model, kind = type(merged._tome.model).__name__, type(merged).__mro__[1]
    warnings.warn(
        f"{model} has attributes of its own that are named as some of a merged model's: "
        f"{', '.join(names)}. merged.{names[0]} is the model's; tomepass's is "
        f"{kind.__module__}.{kind.__name__}.{names[0]}(merged)",
        stacklevel=3,
    )


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = model
    for name in path.split("."):
        # Dynamo looks through what is compiled already, which then has no _orig_mod.
        value = getattr(value, name, value) if name == "_orig_mod" else getattr(value, name)
    return value  # type: ignore[no-any-return]


def _first_tensor(call: dict[str, Any]) -> Tensor | None:
    """The input whose first dimension is the batch."""
    return next((v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.ndim), None)


def check_model(model: object) -> None:
    """Refuses what is no module, what is compiled already, and what routes images to graphs."""
    from tomepass.adaptive import AdaptiveModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TomeError(
            "the model is already compiled",
            advice="give the model itself, and compile what apply returns: "
            "torch.compile(tomepass.apply(model))",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TomeError(
            f"{type(model).__name__} is compiled by TorchScript: there is no Python to capture",
            advice="give the model that torch.jit.trace or torch.jit.script was given",
        )
    if isinstance(model, AdaptiveModel):
        raise TomeError(
            f"the model is already merged with {model._tome.method!r}, which routes images to "
            "several graphs",
            advice="give its .original, or one of its .budgets, which is a graph of its own",
        )
    lazy = [n for n, m in model.named_modules() if _is_lazy(m)]
    if lazy:
        raise TomeError(
            f"parameters of {type(model).__name__} have no shape yet: {lazy[0] or 'it'} is a lazy "
            "module",
            advice="call the model itself once, which makes them",
        )
    refuse_sharded(model)


def _is_lazy(module: nn.Module) -> bool:
    values = (*module._parameters.values(), *module._buffers.values())
    return any(value is not None and torch.nn.parameter.is_lazy(value) for value in values)


def check_one_graph(method: Method, door: str) -> None:
    """Refuses a method that makes several graphs, where a door is about one."""
    if method.adaptive is not False:
        raise TomeError(
            f"adaptive={method.adaptive!r} routes images to several graphs, {door} is about one",
            advice="give a method without adaptive=, or that of one budget: "
            "tomepass.apply(model, method, example_inputs=images).budgets[0].method",
        )


def check_choices(on_unmatched: object, outputs: object) -> None:
    """Refuses any other value of the two options that both doors have."""
    _one_of("on_unmatched", on_unmatched, ("raise", "warn"))
    _one_of("outputs", outputs, ("original", "merged"))


def check_limit(captures: object) -> None:
    """Refuses what is no number of captures to keep."""
    if isinstance(captures, bool) or not isinstance(captures, int):
        raise TypeError(f"captures must be an integer, got {captures!r}")
    if captures < 1:
        raise ValueError(f"captures must be 1 or more, got {captures!r}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
