"""The entry ``torch.compile(model, backend="tome")``: merges tokens, then compiles.

The backend gets a graph from Dynamo, rewrites it, and hands it to another backend, by default
Inductor.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from tomepass.capture.dynamo import capture_dynamo, carry_marks, fix_sizes
from tomepass.counts.schedule import TARGETS
from tomepass.errors import DYNAMO_CONTROL, Refused, TomeError, no_foreign_errors
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.handover.choices import OnUnmatched, Outputs, check_choices
from tomepass.handover.compiling.dynamo import (
    CompiledCall,
    compiled_call,
    is_bucket,
    limit_reached,
    subject_of,
)
from tomepass.handover.compiling.inner import (
    Inner,
    InnerOptions,
    as_options,
    check_inner,
    hashable,
    resolve_inner,
)
from tomepass.kernels.attention import take_fastest_attention
from tomepass.methods import Method, ToMe
from tomepass.model.calls import describe_inputs
from tomepass.model.parallel import sharded_inside
from tomepass.ops.choices import CHOICES
from tomepass.ops.library import is_overhead
from tomepass.planning.plan_graph import plan_graph
from tomepass.planning.streams import CountsRefused
from tomepass.reading.attention import has_attention
from tomepass.reporting.report import Report, make_report
from tomepass.rewriting.sweep import rewrite


def options_of(inner_options: Any) -> dict[str, Any]:
    """Options of an inner backend, a dict; none where None is given.

    Raises:
        TypeError: if they are no mapping of names.
    """
    if inner_options is None:
        return {}
    named = isinstance(inner_options, Mapping) and all(isinstance(n, str) for n in inner_options)
    if not named:
        raise TypeError(f"inner_options must be a dict of options by name, got {inner_options!r}")
    return dict(inner_options)


@dataclass(frozen=True)
class _Settings:
    method: Method | None = ToMe()  # noqa: RUF009 - frozen and hashable
    inner: Inner = "inductor"
    inner_options: InnerOptions = ()
    on_unmatched: OnUnmatched = "raise"
    outputs: Outputs = "original"

    def __post_init__(self) -> None:
        method = getattr(self.method, "method", self.method)  # of a plan
        if not isinstance(method, Method | None):
            raise TypeError(f"method must be a tomepass method, got {self.method!r}")
        object.__setattr__(self, "method", method)
        check_inner(self.inner)
        check_choices(self.on_unmatched, self.outputs)
        if self.method is not None and self.method.adaptive is not False:
            raise Refused(
                "adaptive is not available under torch.compile's backend: images of one batch go "
                "to different graphs",
                advice="use tomepass.apply(model, method, example_inputs=images) and its compile()",
            )
        if self.method is not None and self.method.trace_source:
            raise Refused(
                "trace_source is not available under torch.compile's backend: a compiled model "
                "returns the model's outputs alone",
                advice="apply the module instead: "
                "tomepass.apply(model, ToMe(..., trace_source=True)).tome.source(inputs)",
            )
        object.__setattr__(self, "inner_options", hashable(dict(self.inner_options)))


class TomeBackend(_Settings):
    """``torch.compile(model, backend=TomeBackend(...))``: merge tokens, then compile.

    A frozen, hashable dataclass. Graphs without attention pass through untouched. A graph that
    starts inside a model (after a graph break) is refused unless the method gives ``protected=``.
    ``torch.compile``'s ``options=`` change fields of the backend and of its method by name; its
    ``mode=`` goes to the inner backend.

    Args:
        method: what to do; None for a model that :func:`tomepass.apply` has merged already, which
            is compiled as :func:`resolve_inner` says.
        inner: who compiles the rewritten graph: a backend name that ``torch.compile`` knows, or
            a callable.
        inner_options: options of the inner backend, a dict.
        on_unmatched: ``"raise"`` a TomeError on a graph that cannot be merged, or ``"warn"`` and
            compile it unmerged.
        outputs: as in :func:`tomepass.apply`.
    """

    # Dynamo's registry sets ``_tags`` on a backend found by name. A frozen dataclass refuses any
    # attribute, a plain subclass of one only its fields.

    @property
    def __name__(self) -> str:
        return "tome"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Rewrites a Dynamo graph and hands it to the inner backend."""
        if options:
            return self.with_options(options)(gm, example_inputs, mode=mode)
        compile_graph = resolve_inner(self.inner, as_options(self.inner_options), mode)
        if self.method is None:
            return compile_graph(gm, example_inputs)
        merged = self._merged(gm, example_inputs, self.method)
        if merged is None:
            return compile_graph(gm, example_inputs)
        with no_foreign_errors(
            f"have {self.inner!r} compile the merged graph",
            passing=DYNAMO_CONTROL,
            advice="compile the model itself with that backend first; if that works, this is a "
            "fault of tomepass: please report it with the whole traceback",
        ):
            return compile_graph(carry_marks(gm, merged), example_inputs)

    def reports(self, compiled: Any) -> tuple[Report, ...]:
        """What was found in the graphs with attention that were compiled for a model so far.

        Empty where none was: nothing is merged. ``any(report.ok for report in reports)`` tells
        whether anything is. Dynamo compiles when it is called, so call the model first.

        Args:
            compiled: what was given to ``torch.compile`` with this backend or an equal one, or what
                that returned.
        """
        seen = _SEEN.get(subject_of(compiled), [])
        return tuple(found.report for found in seen if found.backend == self)

    def _merged(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], method: Method
    ) -> fx.GraphModule | None:
        """The graph with tokens merged; None where it is left as it is."""
        call, refusal = compiled_call(), None
        try:
            with no_foreign_errors("read a graph of Dynamo's", passing=DYNAMO_CONTROL):
                captured = _captured(gm, example_inputs)
                if not has_attention(captured.graph):  # a fragment around a break, or all there is
                    if call is not None:
                        _warn_of_nothing(call)
                    return None
                fixed = fix_sizes(captured, gm, example_inputs)
                merged, report = self._rewritten(fixed, method, gm, call)
        except (_AlreadyMergedError, CountsRefused):
            raise
        except TomeError as error:
            merged, report, refusal = None, _unread(method, example_inputs, error), error
        told = call is not None and not _note(call, _Seen(self, report))
        if merged is not None:
            return merged
        if self.on_unmatched == "raise":
            raise refusal or report.refusal()
        if not told:
            warnings.warn(f"left unmerged: {refusal or report.refusal()}", stacklevel=2)
        return None

    def with_options(self, options: dict[str, Any]) -> TomeBackend:
        """A copy with fields of the backend or of its method changed, by name.

        Raises:
            TomeError: on an unknown name; the message lists the valid ones.
        """
        own = [f.name for f in dataclasses.fields(self)]
        mine = dataclasses.replace(self, **{k: v for k, v in options.items() if k in own})
        others = {k: v for k, v in options.items() if k not in own}
        if mine.method is None:
            of_method, known = [], "it has no method to change"
        else:
            of_method = [*(f.name for f in dataclasses.fields(mine.method) if f.init), *TARGETS]
            known = f"and of the method: {', '.join(of_method)}"
        if unknown := sorted(set(others) - set(of_method)):
            raise TomeError(
                f"unknown options {unknown} of the tome backend; valid: {', '.join(own)}, {known}"
            )
        if mine.method is None or not others:
            return mine
        return dataclasses.replace(mine, method=mine.method.replace(**others))

    def _rewritten(
        self,
        captured: CanonicalGraph,
        method: Method,
        gm: fx.GraphModule,
        call: CompiledCall | None,
    ) -> tuple[fx.GraphModule | None, Report]:
        planned = plan_graph(captured, method)
        rewritten = None
        refused: TomeError | None = _BUCKET if is_bucket(gm) else None
        if planned.streams and refused is None:
            try:
                rewritten = rewrite(captured, planned, outputs=self.outputs)
            except TomeError as error:
                refused = error
        if rewritten is None and refused is None and call is not None:
            refused = sharded_inside(call.subject)
        report = make_report("the compiled graph", captured, planned, rewritten, refused)
        if rewritten is None:
            return None, report
        take_fastest_attention(rewritten.module, captured.fake_mode)
        _decide_once(rewritten.module.graph)
        if (limit := limit_reached()) is not None:
            warnings.warn(_LAST.format(limit=limit), stacklevel=2)
        return rewritten.module, report


class _AlreadyMergedError(Refused):
    """The compiled model is one of ours: that is said whatever is done with what is unmatched."""


def _captured(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CanonicalGraph:
    """A graph of Dynamo's in the dialect."""
    captured = capture_dynamo(gm, example_inputs)
    if any(is_overhead(node) for node in captured.graph.nodes):
        raise _AlreadyMergedError(
            "the model is already merged",
            advice="compile the applied module with TomeBackend(None), or with another "
            'backend: torch.compile(merged, backend="inductor")',
        )
    return captured


def _unread(method: Method, example_inputs: Sequence[Any], error: TomeError) -> Report:
    """What is told of a graph that could not be read."""
    tensors = [v for v in example_inputs if isinstance(v, Tensor)]
    given = [v for v in tensors if not isinstance(v, nn.Parameter)]
    inputs = {f"input {place}": value for place, value in enumerate(given)}
    return Report.of_nothing("the compiled graph", describe_inputs(inputs), method, error)


@dataclass(frozen=True)
class _Seen:
    """What a backend found in one graph."""

    backend: TomeBackend
    report: Report


def _note(call: CompiledCall, found: _Seen) -> bool:
    """Keeps what was found for a model; was no graph of it refused for the same reason?"""
    seen = _SEEN.setdefault(call.subject, [])
    then = (one.report.refused for one in seen if one.backend == found.backend)
    new = found.report.refused not in then
    seen.append(found)
    return new


# Graphs with attention by what was compiled. Dynamo's own caches live as long as that, too.
_SEEN: weakref.WeakKeyDictionary[Any, list[_Seen]] = weakref.WeakKeyDictionary()


_WARNED: weakref.WeakSet[Any] = weakref.WeakSet()

_BUCKET = Refused(
    "this graph is one of the buckets that Dynamo cuts a model in DistributedDataParallel into, so "
    "that gradients are reduced while others are computed; tokens merged in a bucket would be "
    "unmerged at its end",
    advice="set torch._dynamo.config.optimize_ddp = False before the first call: Dynamo then gives "
    "the model in one piece",
)


_LAST = (
    "this is graph {limit} of {limit} that Dynamo compiles for one function: inputs of yet another "
    "size or kind run the model itself, unmerged. What to do: raise "
    "torch._dynamo.config.recompile_limit before the first call; or tomepass.apply(model), which "
    "merges inputs of any number of sizes; or fullgraph=True, under which Dynamo raises instead"
)


def _decide_once(graph: fx.Graph) -> None:
    """Has checkpointed regions keep which tokens they chose: chosen again, ties might flip."""
    for node in graph.nodes:
        if node.target in CHOICES and "recompute" in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _warn_of_nothing(call: CompiledCall) -> None:
    """Warns at the end of a call, once for what is compiled, if no graph of it holds attention."""

    def say() -> None:
        if call.subject in _SEEN or call.subject in _WARNED:
            return
        _WARNED.add(call.subject)
        name = getattr(call.subject, "__name__", type(call.subject).__name__)
        warnings.warn(
            f"nothing is merged in {name}: no graph that Dynamo compiled for it holds attention. "
            "What to do: tomepass.explain(model) shows the whole model; where attention is in a "
            "kernel of another library, switch that off; where TORCH_LOGS=graph_breaks names "
            "breaks inside the attention, remove them",
            stacklevel=2,
        )

    call.at_its_end(say)


tome_backend = TomeBackend()
"""The backend with its defaults: ``ToMe(r=16)``, compiled by Inductor."""
