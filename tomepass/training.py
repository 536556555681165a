"""Training the policies of learned methods, beside a model that stays as it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.axis import Axis, shape_of
from tomepass.capture import Capture, capture_module
from tomepass.counts import BlockPlan, StreamPlan, plan_counts
from tomepass.errors import TomeError
from tomepass.graphs import with_outputs
from tomepass.methods import Learned, Method, Policy
from tomepass.methods.fields import flag, number, whole
from tomepass.methods.reduction import Reduction
from tomepass.module import MergedModel, check_model, read_state
from tomepass.planning import PlannedStream, plan_graph
from tomepass.report import make_report
from tomepass.rewrite import rewrite
from tomepass.tables import progress_bar

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock

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
    with _seeded(whole("seed", seed), _devices(model)):
        trained = _Training(model, method, example)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=0.0)
        with progress_bar(progress) as bar:
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
        self.stream = _planned(model, self.capture, method)
        self.rates = _rates(self.stream.plan)
        self.weights = _first_weights(self.stream, method, self.rates)
        self.held = _Held(self.weights, _left(self.stream.plan))
        soft = _Soft(
            [block.r for block in self.stream.plan.blocks],
            protected=self.stream.plan.protected,
            of=method,
            weights=self.held,
        )
        rewritten = rewrite(self.capture.graph, plan_graph(self.capture.graph, soft))
        masks = [name for name in rewritten.matches[0] if name is not None]
        self.graph = with_outputs(rewritten.module, masks)
        self.tokens = _returned_tokens(self.capture, self.stream)

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
        terms = [RATE * _rate_loss(free, self.rates)]
        logits, whole = self._logits(student), self._logits(teacher)
        if logits is not None and whole is not None:
            terms.append(OUTPUTS * _divergence(logits, whole))
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


# ---- the training form -----------------------------------------------------------------------


class _Held:
    """Weights in training, compared by identity; tokens a block is to leave, without protected."""

    def __init__(self, blocks: dict[int, dict[str, nn.Parameter]], left: dict[int, int]) -> None:
        self.blocks, self.left = blocks, left


@dataclass(frozen=True)
class _Whole(BlockPlan):
    """A block of the training form: r tokens are to go, and none does."""

    @property
    def tokens_out(self) -> int:
        return self.tokens_in


@dataclass(frozen=True, repr=False, kw_only=True)
class _Soft(Method):
    """The training form of a learned method: sizes are a mask with gradients.

    Args:
        of: the method.
        weights: being trained.
    """

    holes: ClassVar[bool] = True
    soft: ClassVar[bool] = True

    of: Learned
    weights: _Held
    prop_attn: bool = False

    def plan(self, tokens: int, protected: tuple[int, ...], depth: int) -> StreamPlan:
        """As many merge points as the method has, and all tokens at each."""
        plan = plan_counts(tokens, protected, self.counts(depth), 1, self.of.most)
        blocks = tuple(_Whole(block.index, tokens, block.r) for block in plan.blocks)
        return StreamPlan(tokens, protected, blocks)

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Draws which tokens would stay. Protected ones come first, as they do in use."""
        held = self.weights.blocks[block.index]
        weights = [block.constant(held[name]) for name in self.of.shapes(block.width)]
        score = self.of.score(block, weights, block.size)
        count, fewer = self.weights.left[block.index], not self.of.counted
        keep = block.call("gumbel_keep", score, block.size, block.protected, count, fewer)
        stands = block.call("select", score, block.tokens, block.protected)
        size = block.call("gather_size", keep, stands)
        places = block.call("places", stands, block.tokens)
        return Reduction(places, chosen=size, stands=stands, combine="keep", size=size)


def _planned(model: nn.Module, capture: Capture, method: Learned) -> PlannedStream:
    """The one stream that is reduced, as it will be in use."""
    planned = plan_graph(capture.graph, method.replace(policy=Policy({})))
    name = type(model).__name__
    if not planned.streams:
        raise make_report(name, capture.graph, planned, None, None).refusal()
    streams = [s for s in planned.streams if any(block.r for block in s.plan.blocks)]
    if len(streams) != 1:
        raise TomeError(
            f"expected one stream of tokens to train a policy for, got {len(streams)} in {name}",
            advice="train on one tower at a time, with a keep rate below 1",
        )
    (stream,) = streams
    for block in stream.stream.blocks:
        node = block.attention.result
        reason = None
        if block.attention.scores:
            reason = "attention written out, product by product"
        elif node.kwargs.get("enable_gqa"):
            reason = "attention with shared keys"
        elif stream.padding is not None:
            reason = "a padding mask"
        if reason is not None:
            raise TomeError(
                f"a policy is trained through fused attention over all tokens, got {reason}",
                block=block.index,
                node=node.name,
                advice='load the model with attn_implementation="sdpa" and leave out attention '
                "masks",
            )
    return stream


def _left(plan: StreamPlan) -> dict[int, int]:
    """How many tokens that are not protected each reducing block leaves."""
    held = len(plan.protected)
    return {block.index: block.tokens_out - held for block in plan.blocks if block.r}


def _rates(plan: StreamPlan) -> list[float]:
    """The same as shares of those there were at first."""
    free = plan.tokens - len(plan.protected)
    return [left / free for left in _left(plan).values()]


def _first_weights(
    stream: PlannedStream, method: Learned, rates: Sequence[float]
) -> dict[int, dict[str, nn.Parameter]]:
    """Random ones, under which each block keeps about the share it should."""
    value = stream.stream.blocks[0].merge_at.meta["val"]
    width, weights = int(value.shape[-1]), {}
    places = [block.index for block in stream.plan.blocks if block.r]
    for index, before, after in zip(places, [1.0, *rates], rates, strict=False):
        share = after / before
        # Of the logits of all random policies, the seed's.
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + index)
        drawn = method.initial(width, math.log(share / (1 - share)), generator)
        weights[index] = {n: nn.Parameter(t.to(value.device)) for n, t in drawn.items()}
    return weights


# ---- the loss --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """Where among a model's outputs its tokens are.

    Args:
        output: the index of the flat output ``[B, N, C]``.
        free: in its order, the positions of tokens that are not protected.
    """

    output: int
    free: tuple[int, ...]

    def distance(self, student: Sequence[Any], teacher: Sequence[Any], mask: Tensor) -> Tensor:
        """Of the tokens left (DynamicViT, section 3.3)."""
        ours, theirs = (side[self.output][:, list(self.free)] for side in (student, teacher))
        squared = (ours.float() - theirs.float()).square().mean(-1)
        mean: Tensor = (squared * mask).sum() / mask.sum().clamp(min=1)
        return mean


def _returned_tokens(capture: Capture, stream: PlannedStream) -> _Tokens | None:
    """The last token sequence of a stream that the model returns."""
    (outputs,) = capture.graph.graph.output_node().args
    layouts, protected = stream.flow.layouts, stream.plan.protected
    found = []
    for index, node in enumerate(outputs):  # type: ignore[arg-type]
        layout = layouts.get(node)
        if layout is None or not layout.plain or layout.tokens != Axis(1):
            continue
        free = [place for place, p in enumerate(layout.positions) if p not in protected]
        whole = len(free) == stream.plan.tokens - len(protected)
        if whole and len(layout.axes) == 1 and len(shape_of(node)) == 3:
            found.append((node, index, tuple(free)))
    if not found:
        return None
    _, index, free_places = max(found)
    return _Tokens(index, free_places)


def _rate_loss(masks: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """How far the shares kept are from those planned, squared (DynamicViT, section 3.3)."""
    pairs = zip(masks, rates, strict=True)
    return torch.stack([(mask.mean(-1) - rate).square().mean() for mask, rate in pairs]).mean()


def _divergence(logits: Tensor, whole: Tensor) -> Tensor:
    """KL of the whole model's classes from the reduced one's (DynamicViT, section 3.3)."""
    ours, theirs = (value.float().log_softmax(-1) for value in (logits, whole))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


# ---- what users give -------------------------------------------------------------------------


def _check(model: nn.Module, method: object) -> None:
    if not isinstance(method, Learned):
        raise TypeError(
            "method must be one whose policy is learned, such as tomepass.methods.DynamicViT(), "
            f"got {method!r}"
        )
    check_model(model)
    if isinstance(model, MergedModel):
        raise TomeError(
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
