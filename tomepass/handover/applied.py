"""A model rewritten for one kind of call: its capture, the new graph, and the report on it.

This is where the stages meet: the model is captured, its graph is read and planned, rewritten, and
reported on.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from tomepass.capture.captured import Capture, read_state
from tomepass.capture.exported import capture_module
from tomepass.capture.fidelity import NotCapturedError
from tomepass.errors import TomeError, no_foreign_errors
from tomepass.graphs.surgery import copied, only_outputs
from tomepass.handover.choices import OnUnmatched, Outputs
from tomepass.kernels.attention import take_fastest_attention
from tomepass.kernels.choose import on_cuda, take_kernels
from tomepass.methods import Method, ToMe
from tomepass.model.alone import exporting
from tomepass.model.calls import call_with, describe_inputs
from tomepass.model.checkpointing import recomputing
from tomepass.planning.plan_graph import plan_graph
from tomepass.planning.streams import PlannedStream
from tomepass.reporting.kept import Counting
from tomepass.reporting.report import Report, make_report
from tomepass.rewriting.rewritten import Rewritten
from tomepass.rewriting.sweep import rewrite

if TYPE_CHECKING:
    from tomepass.handover.router import Router


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
        from tomepass.handover.router import Router

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
        applied = analyse(model, method, call, outputs, forward)
    except NotCapturedError as error:
        if on_unmatched == "raise":
            raise
        applied = not_captured(model, method, call, error)
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


def not_captured(
    model: nn.Module, method: Method, call: dict[str, Any], error: NotCapturedError
) -> Applied:
    """A model that is left as it is, since no graph can stand for it."""
    report = Report.of_nothing(type(model).__name__, describe_inputs(call), method, error)
    return Applied(Capture.of_nothing(error.guards), None, None, report)


def analyse(
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
