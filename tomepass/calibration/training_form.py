"""The form of a model that is trained: every token stays, and a mask says which would be gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tomepass.capture.captured import Capture
from tomepass.counts.blocks import BlockPlan, StreamPlan, plan_counts
from tomepass.errors import Refused
from tomepass.methods import Learned, Method, Policy
from tomepass.methods.reduction import Reduction
from tomepass.planning.plan_graph import plan_graph
from tomepass.planning.streams import PlannedStream
from tomepass.reporting.report import make_report

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock


class Held:
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
class Soft(Method):
    """The training form of a learned method: sizes are a mask with gradients.

    Args:
        of: the method.
        weights: being trained.
    """

    holes: ClassVar[bool] = True
    soft: ClassVar[bool] = True

    of: Learned
    weights: Held
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


def planned(model: nn.Module, capture: Capture, method: Learned) -> PlannedStream:
    """The one stream that is reduced, as it will be in use."""
    planned = plan_graph(capture.graph, method.replace(policy=Policy({})))
    name = type(model).__name__
    if not planned.streams:
        raise make_report(name, capture.graph, planned, None, None).refusal()
    streams = [s for s in planned.streams if any(block.r for block in s.plan.blocks)]
    if len(streams) != 1:
        raise Refused(
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
            raise Refused(
                f"a policy is trained through fused attention over all tokens, got {reason}",
                block=block.index,
                node=node.name,
                advice='load the model with attn_implementation="sdpa" and leave out attention '
                "masks",
            )
    return stream


def left(plan: StreamPlan) -> dict[int, int]:
    """How many tokens that are not protected each reducing block leaves."""
    held = len(plan.protected)
    return {block.index: block.tokens_out - held for block in plan.blocks if block.r}


def rates(plan: StreamPlan) -> list[float]:
    """The same as shares of those there were at first."""
    free = plan.tokens - len(plan.protected)
    return [left / free for left in left(plan).values()]


def first_weights(
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
