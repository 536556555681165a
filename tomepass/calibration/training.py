"""Training the policies of learned methods, beside a model that stays as it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.calibration.training_form import Held, Soft, first_weights, left, planned, rates
from tomepass.calibration.training_loss import divergence, rate_loss, returned_tokens
from tomepass.capture.captured import read_state
from tomepass.capture.exported import capture_module
from tomepass.errors import Refused, TomeError
from tomepass.graphs.surgery import with_outputs
from tomepass.handover.merged import MergedModel, of_one_graph
from tomepass.handover.refusing import check_model
from tomepass.methods import Learned, Policy
from tomepass.methods.fields import flag, number, whole
from tomepass.planning.plan_graph import plan_graph
from tomepass.printing.style import progress_bar
from tomepass.rewriting.sweep import rewrite

LearnedMethod = TypeVar("LearnedMethod", bound=Learned)

# What the terms of the loss count (DynamicViT, section 4.1), besides cross entropy with 1.
OUTPUTS, TOKENS, RATE = 0.5, 0.5, 2.0


GRADIENT_NORM = 1.0


def train_policy(
    model: nn.Module,
    method: LearnedMethod,
    batches: Iterable[Any],
    *,
    labels: bool = False,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> LearnedMethod:
    """Trains the policy of a learned method for a model, which is not changed (arXiv 2106.02034).

    All tokens stay in training. Each block that reduces draws a mask of those that would, by the
    Gumbel-softmax: as many as are kept in use, or, of a method whose images differ in that, at
    most as many. The mask multiplies the exponentials of the attentions that follow. The loss is
    that of DynamicViT: the squared distance of each block's share of tokens from the one planned;
    the divergence of the logits from the whole model's; the squared distance of the tokens left
    at the end from the whole model's, where the model returns them; and the cross entropy, if
    there are labels.

    Args:
        model: in eval mode, its attention fused.
        method: what to train, with its counts or keep rate; a policy it has is not built on.
        batches: gone through once an epoch: a list, or a DataLoader. Each is a tensor, a tuple of
            positional inputs or a dict of keyword inputs, all of one resolution.
        labels: each batch is a pair of inputs and class labels ``[B]``.
        epochs: passes over the batches.
        learning_rate: of AdamW at the start; it falls to 0 along a cosine.
        seed: of the first weights and of the masks. The same seed gives the same policy on the
            same machine; global random state is left as it was.
        progress: show a bar.

    Returns:
        the method with its policy: ``tomepass.apply(model, method)`` carries it out.

    Raises:
        TomeError: if the model is in training mode, cannot be reduced, has attention that is not
            fused, reduces in more than one tower, or returns neither logits ``[B, K]`` nor tokens.
        TypeError, ValueError: on an argument of the wrong kind or out of its range.
    """
    _check(model, method)
    labelled = flag("labels", labels)
    rounds = whole("epochs", epochs, least=1)
    rate = number("learning_rate", learning_rate, 0, 1, above=True)
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("batches: expected one or more, got none")
    example = _split(first, labelled)[0]
    with _seeded(whole("seed", seed), _devices(model)), progress_bar(progress) as bar:
        trained = _Training(model, method, example)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=0.0)
        task = bar.add_task("training", total=rounds)
        for epoch in range(rounds):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * epoch / rounds)) / 2
            loss = _epoch(trained, optimizer, batches, labelled)
            bar.update(task, advance=1, description=f"training, loss {loss:.4f}")
    return method.replace(policy=trained.policy)


def _epoch(
    trained: _Training, optimizer: torch.optim.Optimizer, batches: Iterable[Any], labelled: bool
) -> float:
    """One pass over the batches: the mean loss."""
    total, count = 0.0, 0
    for batch in batches:
        inputs, labels = _split(batch, labelled)
        with torch.enable_grad():
            loss = trained.loss(inputs, labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained.parameters(), GRADIENT_NORM)
        optimizer.step()
        total, count = total + float(loss.detach()), count + 1
    if not count:
        raise ValueError(
            "batches ran out after the first pass: give a list or a DataLoader, not an iterator"
        )
    return total / count


class _Training:
    """A model's training form, and the weights in it."""

    def __init__(self, model: nn.Module, method: Learned, inputs: Any) -> None:
        self.model = model
        self.binding = MergedModel(model, method, "raise", "original")
        call = self.binding._tome.call_of(inputs)
        self.leaves = _shapes(call)
        self.capture = capture_module(model, call)
        self.stream = planned(model, self.capture, method)
        self.rates = rates(self.stream.plan)
        self.weights = first_weights(self.stream, method, self.rates)
        self.held = Held(self.weights, left(self.stream.plan))
        soft = Soft(
            [block.r for block in self.stream.plan.blocks],
            protected=self.stream.plan.protected,
            of=method,
            weights=self.held,
        )
        rewritten = rewrite(self.capture.graph, plan_graph(self.capture.graph, soft))
        masks = [name for name in rewritten.matches[0] if name is not None]
        self.graph = with_outputs(rewritten.module, masks)
        self.tokens = returned_tokens(self.capture, self.stream)

    def parameters(self) -> list[nn.Parameter]:
        return [weight for held in self.weights.values() for weight in held.values()]

    @property
    def policy(self) -> Policy:
        return Policy(self.weights)

    def loss(self, inputs: Any, labels: Tensor | None) -> Tensor:
        """Of one batch."""
        call = self.binding._tome.call_of(inputs)
        if _shapes(call) != self.leaves:
            raise TomeError(
                "a batch of other inputs than the first: all must have one resolution and dtype"
            )
        state = [tensor.detach() for tensor in read_state(self.model, self.capture)]
        values = [*state, *pytree.tree_leaves(call)]
        with torch.no_grad():
            teacher = self.capture.graph.module(*values)
        student, masks = self.graph(*values)
        free = [mask[:, len(self.stream.plan.protected) :] for mask in masks]
        terms = [RATE * rate_loss(free, self.rates)]
        logits, whole = self._logits(student), self._logits(teacher)
        if logits is not None and whole is not None:
            terms.append(OUTPUTS * divergence(logits, whole))
            if labels is not None:
                terms.append(F.cross_entropy(logits.float(), labels.to(logits.device)))
        elif labels is not None:
            raise TomeError("labels need a model that returns logits [B, K]")
        if self.tokens is not None:
            terms.append(TOKENS * self.tokens.distance(student, teacher, free[-1]))
        if len(terms) == 1:
            raise TomeError(
                "the model returns neither logits [B, K] nor its tokens, so there is nothing that "
                "a policy could learn from"
            )
        return torch.stack([term.float() for term in terms]).sum()

    def _logits(self, outputs: Sequence[Any]) -> Tensor | None:
        """The logits among a graph's flat outputs, ``[B, K]``."""
        output = pytree.tree_unflatten(list(outputs), self.capture.out_spec)
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        return found if isinstance(found, Tensor) and found.ndim == 2 else None


def _check(model: nn.Module, method: object) -> None:
    if not isinstance(method, Learned):
        raise TypeError(
            "method must be one whose policy is learned, such as tomepass.methods.DynamicViT(), "
            f"got {method!r}"
        )
    check_model(model)
    if of_one_graph(model):
        raise Refused(
            "the model has tomepass applied already",
            advice="train on the original model, then apply the method that comes back",
        )
    if any(module.training for module in model.modules()):
        raise TomeError(
            "the model is in training mode; its policy alone is trained",
            advice="call model.eval() first",
        )


def _split(batch: Any, labelled: bool) -> tuple[Any, Tensor | None]:
    if not labelled:
        return batch, None
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not pair or not isinstance(batch[1], Tensor):
        raise TypeError("with labels=True each batch is a pair of inputs and a tensor of labels")
    return batch[0], batch[1]


def _shapes(call: dict[str, Any]) -> list[Any]:
    """Inputs up to their batch size and values."""
    leaves = pytree.tree_leaves(call)
    return [(v.shape[1:], v.dtype, v.device) if isinstance(v, Tensor) else v for v in leaves]


def _devices(model: nn.Module) -> list[torch.device]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)


@contextmanager
def _seeded(seed: int, devices: list[torch.device]) -> Iterator[None]:
    """Global random state, seeded, and put back afterwards."""
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
