"""The module that `tomepass.apply` returns: it runs rewritten graphs on the model's parameters."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.capture.captured import read_state
from tomepass.capture.fidelity import NotCapturedError, hold_against
from tomepass.errors import TomeError
from tomepass.handover.applied import Applied, make_applied, not_captured
from tomepass.handover.captures import CAPTURES, Captures, Check, Make
from tomepass.handover.choices import OnUnmatched, Outputs
from tomepass.handover.standing_in.bypass import captured_another, merging
from tomepass.handover.standing_in.tome import Tome
from tomepass.handover.standing_in.wrapping import StandIn, gives_way, stand_in
from tomepass.methods import Method
from tomepass.model.calls import Inputs, as_call, call_with, check_call
from tomepass.reporting.kept import KeptReport
from tomepass.reporting.report import Report


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
            make = maker(method, on_unmatched, outputs)
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
        return rebuild, (tome.model, tome.method, tome.on_unmatched, tome.outputs, kept)

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


def maker(method: Method, on_unmatched: OnUnmatched, outputs: Outputs) -> Make:
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
            return not_captured(model, method, call, error)
        if unlike == applied.capture.uncompared:
            return applied
        capture = replace(applied.capture, uncompared=unlike)
        return replace(
            applied, capture=capture, report=replace(applied.report, notes=capture.notes)
        )

    return check


def call_of(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Inputs in the shapes :meth:`MergedModel.prepare` takes them, as a model's keyword inputs."""
    call = Inputs.of(model).bind(*as_call(inputs))
    check_call(call, type(model).__name__)
    return call


def rebuild(
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


def _first_tensor(call: dict[str, Any]) -> Tensor | None:
    """The input whose first dimension is the batch."""
    return next((v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.ndim), None)


def check_limit(captures: object) -> None:
    """Refuses what is no number of captures to keep."""
    if isinstance(captures, bool) or not isinstance(captures, int):
        raise TypeError(f"captures must be an integer, got {captures!r}")
    if captures < 1:
        raise ValueError(f"captures must be 1 or more, got {captures!r}")
