"""How far a reduced model is from the model itself, on images: divergence, agreement, top-1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.calibration.values import Score
from tomepass.capture.captured import read_state
from tomepass.errors import TomeError, the_users_own
from tomepass.handover.applied import apply_capture, read_streams
from tomepass.handover.captures import signature_of
from tomepass.handover.merged import call_of, of_one_graph
from tomepass.handover.refusing import check_model
from tomepass.methods import Method
from tomepass.model.batches import Form, first_of
from tomepass.model.calls import describe_inputs
from tomepass.model.unmerged import answer_of, check_values
from tomepass.planning.costs import ModelCosts
from tomepass.planning.streams import Planned
from tomepass.rewriting.sweep import rewrite


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model answers for images, and what a reduced one makes of it, ``[images]`` each."""

    divergence: Tensor
    same: Tensor | None
    right: Tensor | None

    def score(self, images: Sequence[int] | None = None) -> Score:
        """Over some of the images; all by default."""
        place = slice(None) if images is None else torch.tensor(list(images), dtype=torch.int64)
        return Score(
            float(self.divergence[place].mean()),
            None if self.same is None else float(self.same[place].float().mean()),
            None if self.right is None else float(self.right[place].float().mean()),
            len(self.divergence[place]),
        )


class Judge:
    """A model and images to hold its reduced forms against. The model runs once, when made.

    Args:
        model: in eval mode.
        batches: of inputs, each as for :func:`tomepass.apply`, alike but for their length.
        labels: ``[images]`` class indices, if they are known.

    Raises:
        TomeError: if there are no batches, or they differ in more than their length; if the model
            cannot be merged, is in training mode, or is on the meta device; if the model itself
            raises for one, which is then its cause, or answers with what cannot be compared.
        TypeError: if ``batches`` is no iterable of inputs. What it raises itself comes through.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], labels: Tensor | None = None
    ) -> None:
        self.model = model._tome.model if of_one_graph(model) else model
        check_model(self.model)
        if self.model.training:
            raise TomeError(
                "outputs are compared, which takes eval mode", advice="call model.eval() first"
            )
        self.calls = [call_of(self.model, batch) for batch in given(batches)]
        if not self.calls:
            raise TomeError("there are no images", advice="give at least one batch of inputs")
        for place, call in enumerate(self.calls):
            _check_images(self.model, call, place)
        self.labels = labels
        self.capture, streams = read_streams(self.model, self.calls[0])
        _check_alike(self.model, self.calls, self.capture.form)
        self.costs = ModelCosts.read(self.capture.graph, streams)
        with torch.no_grad():
            answers = [_answer(self.model, call) for call in self.calls]
        self.unmerged = torch.cat([answer for answer, _ in answers])
        self.classifies = answers[0][1]

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.unmerged)

    @property
    def depth(self) -> int:
        """Blocks of the deepest stream."""
        return self.costs.depth

    def share(self, method: Method) -> float:
        """The share of the multiply-accumulates that a method leaves; nothing is run."""
        return self.costs.share(method)

    def outputs(self, method: Method) -> Outputs:
        """Runs the reduced model, eagerly, on all images.

        Raises:
            TomeError: if the method does not fit the model.
        """
        graph, state = self._reduced(method), read_state(self.model, self.capture)
        with torch.no_grad():
            answers = [graph(*state, *pytree.tree_leaves(call)) for call in self.calls]
        spec = self.capture.out_spec
        reduced = torch.cat([_read(pytree.tree_unflatten(list(a), spec))[0] for a in answers])
        if not self.classifies:
            return Outputs(_distance(reduced, self.unmerged), None, None)
        same = reduced.argmax(-1) == self.unmerged.argmax(-1)
        right = None if self.labels is None else reduced.argmax(-1) == self.labels
        return Outputs(_kl(self.unmerged, reduced), same, right)

    def _reduced(self, method: Method) -> fx.GraphModule:
        """The rewritten graph. The model is read once: methods differ in their counts alone."""
        if method.protected is not None or method.schedule.macs is not None:
            applied = apply_capture(self.model, self.capture, method)
            if applied.graph is None:
                raise applied.report.refusal()
            return applied.graph
        method.ready()
        planned = Planned(method, self.costs.planned(method), ())
        return rewrite(self.capture.graph, planned).module

    def score(self, method: Method) -> Score:
        """How close the reduced model is, over all images."""
        return self.outputs(method).score()


def given(batches: Iterable[Any]) -> Iterator[Any]:
    """The user's batches. What their iterable raises comes through as it is."""
    if isinstance(batches, (Tensor, Mapping, str, bytes)):
        raise TypeError(
            "batches must be an iterable of inputs, such as a list or a DataLoader, got one "
            f"{type(batches).__name__}: give [batch] for a single batch"
        )
    if not hasattr(type(batches), "__iter__") and not hasattr(type(batches), "__getitem__"):
        raise TypeError(f"batches must be an iterable of inputs, got {type(batches).__name__}")
    with the_users_own():
        rest = iter(batches)
    while True:
        with the_users_own():
            try:
                batch = next(rest)
            except StopIteration:
                return
        yield batch


def _check_images(model: nn.Module, call: dict[str, Any], place: int) -> None:
    """Refuses a batch of nothing, or without values."""
    check_values(model, call, "comparing outputs")
    first = first_of(call)
    if first is not None and not first.shape[0]:
        raise TomeError(
            f"batch {place} holds no images: {describe_inputs(call)}", advice="leave it out"
        )


def _check_alike(model: nn.Module, calls: Sequence[dict[str, Any]], form: Form) -> None:
    """Refuses a batch for which the graph made for the first one does not hold."""
    expected = signature_of(model, calls[0], "forward", form)
    for place, call in enumerate(calls):
        if signature_of(model, call, "forward", form) != expected:
            alike = "alike but for their length"
            if form.size is not None:
                alike = "of one length, since this model is captured for a fixed batch size alone"
            raise TomeError(
                f"expected batches {alike}: the first is {describe_inputs(calls[0])}, "
                f"batch {place} is {describe_inputs(call)}",
                advice="give each resolution, dtype and device to a call of its own; of a fixed "
                "length, leave out a last batch that is shorter",
            )


def _answer(model: nn.Module, call: dict[str, Any]) -> tuple[Tensor, bool]:
    """What the model itself answers: see :func:`_read`."""
    answer, classifies = _read(answer_of(model, call))
    first = first_of(call)
    assert first is not None
    name, inputs = type(model).__name__, describe_inputs(call)
    if answer.shape[0] != first.shape[0]:
        raise TomeError(
            f"expected a row an image as {name}'s first floating-point output, got "
            f"{list(answer.shape)} for inputs {inputs}"
        )
    if not bool(answer.isfinite().all()):
        raise TomeError(
            f"{name} itself returns values that are not finite for inputs {inputs}, nothing merged",
            advice="look for NaN and infinities in the inputs and the parameters",
        )
    return answer, classifies


def _read(outputs: Any) -> tuple[Tensor, bool]:
    """What stands for a model's answer, ``[B, ...]``, and whether it is logits ``[B, classes]``."""
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits, True
    leaves = pytree.tree_leaves(outputs)
    found = [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point() and v.ndim]
    if not found:
        raise TomeError("the model returns no floating-point tensor to compare")
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return outputs, True
    return found[0], False


def _kl(unmerged: Tensor, reduced: Tensor) -> Tensor:
    before, after = unmerged.double().log_softmax(-1), reduced.double().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1)


def _distance(reduced: Tensor, unmerged: Tensor) -> Tensor:
    difference = (reduced.double() - unmerged.double()).square().flatten(1).mean(-1)
    return difference / unmerged.double().square().mean()
