"""Merges more tokens in images whose tokens are more alike: methods with ``adaptive=True``.

The model is rewritten for a few budgets, that is numbers of tokens to merge. For every image a
router (``router.py``) measures how alike its tokens are, and the image runs through the graph of
the fitting budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.errors import Refused, TomeError
from tomepass.handover.added import Added, captured
from tomepass.handover.applied import Applied, accepted, apply_capture, make_applied
from tomepass.handover.captures import CAPTURES, Captures, Make
from tomepass.handover.choices import OnUnmatched, Outputs
from tomepass.handover.merged import MergedModel, call_of, checker, warn_of_names
from tomepass.handover.standing_in.bypass import captured_another
from tomepass.handover.standing_in.wrapping import moved, shadowed, stand_in
from tomepass.methods import Method, ToMe
from tomepass.planning.plan_graph import plan_graph
from tomepass.planning.streams import PlannedStream
from tomepass.sources.examples import example_inputs as inputs_from_config

BUDGETS = (0.85, 1.0, 1.15)
"""Shares of the method's counts, from the least redundant images to the most.

Divergence grows faster than the counts: budgets that lie farther apart lose more than routing
gains.
"""


class Several(Added["AdaptiveModel"]):
    """What tomepass adds where images go to several graphs: ``merged.tome``."""

    @property
    def budgets(self) -> tuple[MergedModel, ...]:
        """The models that images go to, from the least redundant images to the most."""
        return self._merged._tome_budgets()

    def routes(self, *args: Any, **kwargs: Any) -> Tensor:
        """The budget of each image, ``[B]`` int64. Takes the model's inputs."""
        tome = self._merged._tome
        call = tome.bind(args, kwargs)
        return self._merged._tome_routes(tome.captures.get(tome.model, call), call)

    def clear(self) -> None:
        """Forgets all that was captured; what is needed is captured again."""
        super().clear()
        for budget in self._merged._tome_parts:
            budget._tome.captures.clear()

    def report(self, inputs: Any = None) -> NoReturn:
        """Raises: each budget has one of its own."""
        raise self._of_one("a report")

    def captured(self, inputs: Any) -> NoReturn:
        """Raises: each budget has one of its own."""
        raise self._of_one("a capture")

    def source(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: images of one batch have different sequences."""
        raise self._of_one("a source map")

    def kept(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: each budget has one of its own."""
        raise self._of_one("a count of tokens")

    def _of_one(self, what: str) -> Refused:
        return Refused(
            f"{self.method!r} routes images to several graphs, and {what} is of one",
            advice="ask one of the budgets, each of which is a graph of its own: "
            "merged.tome.budgets[0].tome",
        )


class AdaptiveModel(MergedModel):
    """A model with a few budgets, and a router; :func:`tomepass.apply` makes it.

    Each image goes, by :func:`redundancy`, to one of the models in ``budgets``; the results come
    back in the order of the batch. An image's result does not depend on its neighbours. What is
    about one graph, such as a report, its budgets answer and it refuses.

    Args:
        model: the model.
        method: with ``adaptive`` thresholds, as many as lie between the budgets.
        on_unmatched: as for :func:`tomepass.apply`.
        budgets: the methods, from the least redundant images to the most.
        ready: the model as captured already, nothing reduced.
        captures: how many captures are kept, for each budget and of the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        on_unmatched: OnUnmatched,
        budgets: Sequence[Method],
        ready: Applied | None = None,
        captures: int = CAPTURES,
    ) -> None:
        # The model is captured once: budgets differ in their counts alone.
        plain = Captures(_capturing(ready), checker(ToMe(0), "raise"), captures)
        self.__dict__["_tome_parts"] = tuple(
            MergedModel(model, each, "raise", "original", _reduced(plain, each)) for each in budgets
        )
        super().__init__(model, method, on_unmatched, "original", plain)

    _tome_graphs = "several"
    _tome_parts: tuple[MergedModel, ...]

    def _tome_answer(self, call: dict[str, Any], method: str) -> Any:
        tome = self._tome
        applied = tome.captures.get(tome.model, call, method)
        form = applied.capture.form
        if form.size is not None:
            raise Refused(
                f"{type(tome.model).__name__}.{method} can be captured for a fixed batch size "
                "alone, so its images cannot be split over budgets",
                advice="apply the method without adaptive=",
            )
        routes = self._tome_routes(applied, call)
        images = routes.shape[0]
        parts, places = [], []
        for number, budget in enumerate(self._tome_budgets()):
            mine = (routes == number).nonzero()[:, 0]
            if len(mine) or (not images and number == 0):
                places.append(mine)
                parts.append(budget._tome_called(form.rows(call, mine), method))
        return _together(parts, torch.cat(places).argsort(), [len(p) for p in places])

    def _tome_routes(self, applied: Applied, call: dict[str, Any]) -> Tensor:
        tome = self._tome
        found = applied.router(tome.model, applied.capture, call)
        limits = torch.tensor(tome.method.adaptive, dtype=torch.float32)
        return torch.bucketize(found, limits.to(found.device), right=True)

    def _tome_budgets(self) -> tuple[MergedModel, ...]:
        """Those of a replica read the replica's parameters."""
        model = self._tome.model
        if self._tome_parts[0]._tome.model is model:
            return self._tome_parts
        return tuple(budget._tome_over(model) for budget in self._tome_parts)

    def _tome_remade(self) -> tuple[Any, tuple[Any, ...]]:
        tome, budgets = self._tome, tuple(budget._tome.method for budget in self._tome_parts)
        kept = tome.captures.limit
        return _rebuild, (tome.model, tome.method, tome.on_unmatched, budgets, None, kept)

    def _tome_added(self) -> Several:
        return Several(self)

    budgets, routes = moved("budgets", is_value=True), moved("routes")

    def _tome_prepare(self, inputs: Any) -> None:
        for budget in self._tome_budgets():
            captured(budget, inputs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each budget by ``torch.compile``, whose arguments it takes.

        Groups differ in size from batch to batch, so sizes are dynamic unless it is said otherwise.
        """
        kwargs.setdefault("dynamic", True)
        for budget in self._tome_parts:
            budget.compile(*args, **kwargs)


def make_adaptive(
    model: nn.Module,
    method: Method,
    example_inputs: Any,
    on_unmatched: OnUnmatched,
    outputs: Outputs,
    captures: int = CAPTURES,
) -> AdaptiveModel:
    """The model behind ``apply(model, method)`` where the method is adaptive.

    Raises:
        TomeError: if there are no images to measure thresholds on, or none to capture with can be
            made from the config.
    """
    if outputs == "merged":
        raise ValueError(
            "outputs='merged' and adaptive=... make no sense together: images of one batch "
            "keep different numbers of tokens"
        )
    if example_inputs is None and method.adaptive is not True:
        example_inputs = inputs_from_config(model)
    if example_inputs is None:
        raise TomeError(
            f"{method!r} routes images by their redundancy, which is to be measured",
            advice="give example_inputs=: a batch of real images, 32 or more",
        )
    call = call_of(model, example_inputs)
    ready = make_applied(model, ToMe(0), call)
    stream = plan_graph(ready.capture.graph, ToMe(0)).streams[0]
    if method.adaptive is True:
        found = ready.router(model, ready.capture, call)
        method = method.replace(adaptive=_thresholds(found))
    plain = method.replace(adaptive=False)
    budgets = [_scaled(plain, share, stream) for share in BUDGETS]
    made = _rebuild(model, method, on_unmatched, budgets, ready, captures)
    if names := shadowed(made):
        warn_of_names(made, names)
    made._tome_prepare(example_inputs)
    return made


def _rebuild(
    model: nn.Module,
    method: Method,
    on_unmatched: OnUnmatched,
    budgets: Sequence[Method],
    ready: Applied | None = None,
    captures: int = CAPTURES,
) -> AdaptiveModel:
    cls = stand_in(AdaptiveModel, model)
    made: AdaptiveModel = cls(model, method, on_unmatched, budgets, ready, captures)
    return made


def _capturing(ready: Applied | None) -> Make:
    """Captures a model, nothing reduced; the first time there may be one."""
    waiting = [] if ready is None else [ready]

    def make(model: nn.Module, call: dict[str, Any], forward: str) -> Applied:
        if waiting:
            return waiting.pop()
        captured_another()
        return make_applied(model, ToMe(0), call, forward=forward)

    return make


def _reduced(plain: Captures, method: Method) -> Captures:
    """What was captured once for all budgets, reduced for one."""

    def make(model: nn.Module, call: dict[str, Any], forward: str) -> Applied:
        capture = plain.get(model, call, forward).capture
        return accepted(apply_capture(model, capture, method), "raise")

    # The capture has been held against the model: that a router ran on it is enough.
    return Captures(make, lambda applied, *_: applied, plain.limit)


def _thresholds(found: Tensor) -> tuple[float, ...]:
    """Redundancies that split images evenly over the budgets, given theirs, ``[B]``."""
    if len(found) < len(BUDGETS):
        raise TomeError(
            f"adaptive=True splits images over {len(BUDGETS)} budgets by what it measures on "
            f"example_inputs, which hold {len(found)}",
            advice="give a batch of real images, 32 or more",
        )
    shares = torch.arange(1, len(BUDGETS), dtype=torch.float64) / len(BUDGETS)
    return tuple(found.double().quantile(shares.to(found.device)).tolist())


def _scaled(method: Method, share: float, stream: PlannedStream) -> Method:
    """A method that takes a share of its tokens in every block."""
    if method.schedule.kind == "keep_rate":
        rate = float(method.schedule.values[0])
        return method.replace(keep_rate=max(1 - (1 - rate) * share, 0.01))
    if method.schedule.macs is not None:
        return method.replace(macs=max(1 - (1 - method.schedule.macs) * share, 0.01))
    counts = method.counts(len(stream.plan.blocks))
    return method.replace(r=[round(count * share) for count in counts], blocks=None)


def _together(parts: list[Any], order: Tensor, lengths: list[int]) -> Any:
    """The outputs of several groups, in the order of the batch."""
    leaves, form = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    joined: list[Any] = []
    for values in zip(*leaves, strict=True):
        batched = all(
            isinstance(value, Tensor) and value.ndim and value.shape[0] == length
            for value, length in zip(values, lengths, strict=True)
        )
        if not batched and any(value is not None for value in values):
            raise Refused(
                "the model returns something that is not one entry an image, which cannot be put "
                "together from several budgets",
                advice="apply the method without adaptive=",
            )
        joined.append(torch.cat(values)[order] if batched else None)
    return pytree.tree_unflatten(joined, form[0])
