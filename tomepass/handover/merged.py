"""The module that `tomepass.apply` returns: it runs rewritten graphs on the model's parameters."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, ClassVar, TypeGuard

import torch
from torch import nn

from tomepass.capture.fidelity import NotCapturedError, hold_against
from tomepass.handover.added import Added, captured
from tomepass.handover.applied import Applied, make_applied, not_captured
from tomepass.handover.captures import CAPTURES, Captures, Check, Make
from tomepass.handover.choices import OnUnmatched, Outputs
from tomepass.handover.standing_in.bypass import captured_another, merging
from tomepass.handover.standing_in.tome import Tome
from tomepass.handover.standing_in.wrapping import StandIn, moved, stand_in, value_gives_way
from tomepass.methods import Method, MethodLike, RLike
from tomepass.methods.asked import resolve_method
from tomepass.model.calls import Inputs, as_call, call_with, check_call


class MergedModel(StandIn):
    """A model with merging applied; see :func:`apply`, which makes it.

    It stands in for the model: attributes, class, parameters, buffers and submodules are the
    model's, so ``state_dict()``, ``to()``, ``train()`` and the rest act on both. What it adds lives
    beside them: one rewritten graph for each call signature, resolution, dtype and mode, of the
    forward and of methods that attend on their own.

    All of that stands under one name, :attr:`tome`. Where the model has an attribute of that name,
    it is the model's, and ``MergedModel.tome(merged)`` is ours.
    """

    _tome_graphs: ClassVar[str] = "one"
    """Whether a call runs one graph, or its images are split over ``"several"``."""

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

    # ---- what is added -----------------------------------------------------------------------

    @value_gives_way
    def tome(self) -> Added[MergedModel]:
        """What tomepass adds: the method, reports, where the tokens went."""
        return self._tome_added()

    def _tome_added(self) -> Added[MergedModel]:
        return Added(self)

    prepare, source, kept = moved("prepare"), moved("source"), moved("kept")
    kept_report, report = moved("kept_report"), moved("report")
    captured, bind = moved("captured"), moved("bind")
    method, original = moved("method", is_value=True), moved("original", is_value=True)
    outputs, on_unmatched = moved("outputs", is_value=True), moved("on_unmatched", is_value=True)


def of_one_graph(model: object) -> TypeGuard[MergedModel]:
    """Is it a merged model whose calls run one graph? An adaptive one runs several."""
    return isinstance(model, MergedModel) and model._tome_graphs == "one"


def asked_of(
    model: nn.Module, method: MethodLike | None, r: RLike | None, **targets: float | None
) -> tuple[nn.Module, Method]:
    """The model under a merged one, and the method asked of it: by default the merged one's.

    Raises:
        TypeError, ValueError: as :func:`resolve_method` says.
    """
    standing = None
    if of_one_graph(model):
        standing, model = model._tome.method, model._tome.model
    return model, resolve_method(method, r, standing=standing, **targets)


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
    """Inputs in the shapes :meth:`Added.prepare` takes them, as a model's keyword inputs."""
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


def warn_of_names(merged: StandIn, names: list[str]) -> None:
    """Says which names of ours are the model's."""
    model = type(merged._tome.model).__name__
    ours = "tomepass.MergedModel.tome(merged)" if "tome" in names else f"merged.tome.{names[0]}"
    warnings.warn(
        f"{model} has attributes of its own that are named as some of a merged model's: "
        f"{', '.join(names)}. merged.{names[0]} is the model's; tomepass's is {ours}",
        stacklevel=3,
    )


def check_limit(captures: object) -> None:
    """Refuses what is no number of captures to keep."""
    if isinstance(captures, bool) or not isinstance(captures, int):
        raise TypeError(f"captures must be an integer, got {captures!r}")
    if captures < 1:
        raise ValueError(f"captures must be 1 or more, got {captures!r}")
