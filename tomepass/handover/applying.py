"""The entries `tomepass.apply` and `tomepass.explain`.

``apply`` returns a module that merges tokens; ``explain`` reports what would be merged, and builds
no module.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tomepass.errors import Refused, TomeError, no_foreign_errors
from tomepass.handover.added import captured, told_of_limit
from tomepass.handover.applied import analyse
from tomepass.handover.captures import CAPTURES
from tomepass.handover.choices import OnUnmatched, Outputs, check_choices, check_one_graph
from tomepass.handover.merged import (
    MergedModel,
    asked_of,
    call_of,
    check_limit,
    of_one_graph,
    rebuild,
    warn_of_names,
)
from tomepass.handover.refusing import check_model
from tomepass.handover.standing_in.wrapping import shadowed
from tomepass.methods import MethodLike, RLike
from tomepass.methods.asked import resolve_method
from tomepass.reporting.report import Report
from tomepass.sources.examples import example_inputs as inputs_from_config


@no_foreign_errors("apply itself to the model")
def apply(
    model: nn.Module,
    method: MethodLike | None = None,
    *,
    r: RLike | None = None,
    keep_rate: float | None = None,
    macs: float | None = None,
    speedup: float | None = None,
    example_inputs: Any = None,
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
    captures: int = CAPTURES,
) -> MergedModel:
    """A module that computes what ``model`` computes, with redundant tokens merged.

    The model itself is not changed; its parameters are shared, as with ``torch.compile``.

    Args:
        model: any encoder; HuggingFace vision and audio models need nothing more.
        method: what to do, for example ``ToMe(r=8)``. Default ``ToMe()``, r=16.
        r: short for ``method=ToMe(r=r)``, as the next three are for ``ToMe`` with them.
        keep_rate: the share of the tokens to keep at a quarter, a half and three quarters.
        macs: the share of the multiply-accumulates to keep.
        speedup: how many times as many there are unmerged.
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
        a :class:`MergedModel`, of several graphs where the method is adaptive.

    Raises:
        TomeError: if the model cannot be merged exactly, with block, node, source line, reason.
        TypeError, ValueError: on a wrong ``r`` or target, or more than one of them and ``method``
            given.
    """
    method = resolve_method(method, r, keep_rate=keep_rate, macs=macs, speedup=speedup)
    check_choices(on_unmatched, outputs)
    check_limit(captures)
    if of_one_graph(model):
        raise Refused(
            f"the model is already merged with {model._tome.method!r}",
            advice="apply tomepass to the original model",
        )
    check_model(model)
    if method.adaptive is not False:
        from tomepass.handover.adaptive import make_adaptive

        return make_adaptive(model, method, example_inputs, on_unmatched, outputs, captures)
    merged = rebuild(model, method, on_unmatched, outputs, captures)
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
    method: MethodLike | None = None,
    *,
    r: RLike | None = None,
    keep_rate: float | None = None,
    macs: float | None = None,
    speedup: float | None = None,
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
        TypeError, ValueError: on a wrong ``r`` or target, or more than one of them and ``method``
            given.
    """
    model, method = asked_of(model, method, r, keep_rate=keep_rate, macs=macs, speedup=speedup)
    check_choices(on_unmatched, outputs)
    check_model(model)
    check_one_graph(method, "explain")
    check_limit(captures)
    inputs = inputs_from_config(model) if example_inputs is None else example_inputs
    call = call_of(model, inputs)
    return told_of_limit(analyse(model, method, call, outputs), captures)
