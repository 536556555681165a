"""Pruning by what was learned: small modules, trained beside a frozen model, score the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tomepass.counts.schedule import Schedule
from tomepass.errors import NotTrained
from tomepass.methods.dropping.prune import Pruning, refuse_sizes
from tomepass.methods.learned.policy import Policy

if TYPE_CHECKING:
    from torch import Generator, Tensor, fx

    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


@dataclass(frozen=True, repr=False, kw_only=True)
class Learned(Pruning):
    """What methods with a trained policy have in common.

    In use too a fixed draw, the same for every image, is added to the scores: see
    :func:`~tomepass.ops.keep_score.drawn`.

    Args:
        policy: the weights, made by :func:`tomepass.train_policy`. None: not trained yet.
    """

    standard: ClassVar[Schedule] = Schedule("keep_rate", (0.7,))
    counted: ClassVar[bool] = True
    """Whether all images keep the tokens the plan counts, in training too."""

    read_out: ClassVar[tuple[str, ...]] = ()
    """The last weights, 0 at first: until something is known a draw is left to chance."""

    policy: Policy | None = None
    prop_attn: bool = False

    def check(self) -> None:
        """Refuses a policy that is none, and sizes."""
        if not isinstance(self.policy, Policy | None):
            raise TypeError(
                f"policy must be what tomepass.train_policy made, or None, got {self.policy!r}"
            )
        refuse_sizes(self)

    def ready(self) -> None:
        """Raises a TomeError if there is no policy."""
        if self.policy is None:
            name = type(self).__name__
            raise NotTrained(
                f"{name} scores tokens by a policy, and this one has none: it is not trained",
                advice=f"train it: tomepass.train_policy(model, {name}(...), batches)",
            )

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Keeps the ``block.left`` tokens that score highest after a draw."""
        weights = [block.constant(weight) for weight in self._weights(block)]
        score = self.score(block, weights, block.masked_size)
        return self.kept(block, block.call("drawn", score, block.tokens, block.index))

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The weights of one block of a stream ``[B, N, width]``, in the operator's order."""
        raise NotImplementedError

    def score(
        self, block: ReducingBlock, weights: Sequence[fx.Node], size: fx.Node | None
    ) -> fx.Node:
        """Log-odds of keeping each token, ``[B, N]``.

        Args:
            weights: as :meth:`shapes` tells.
            size: what each token counts, None for one each.
        """
        raise NotImplementedError

    def kept(self, block: ReducingBlock, score: fx.Node) -> Reduction:
        """Which tokens stay, given their log-odds after the draw."""
        stands = block.call("select", score, block.left, block.protected, block.masked_size)
        return block.pruned(stands)

    def initial(self, width: int, log_odds: float, generator: Generator) -> dict[str, Tensor]:
        """Weights to start training from, under which a token stays with some log-odds."""
        import torch

        weights = {}
        for name, shape in self.shapes(width).items():
            if len(shape) > 1 and name not in self.read_out:
                weights[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
            else:
                weights[name] = torch.full(shape, float(name == "norm.weight"))
        # The last bias: of two logits, or of one.
        last = weights[name]
        last += log_odds if len(last) == 1 else torch.tensor([log_odds / 2, -log_odds / 2])
        return weights

    def _weights(self, block: ReducingBlock) -> list[Tensor]:
        policy = self.policy
        assert policy is not None
        if block.index not in policy.blocks:
            trained = ", ".join(map(str, policy.blocks))
            raise NotTrained(
                f"block {block.index} is to lose tokens, and the policy was trained for blocks "
                f"{trained} alone",
                block=block.index,
                advice="keep the counts, keep rate and blocks it was trained with, or train anew",
            )
        held, width = policy.weights(block.index), block.width
        shapes = self.shapes(width)
        if {name: tuple(tensor.shape) for name, tensor in held.items()} != shapes:
            raise NotTrained(
                f"the policy was trained for another model, or for another method than "
                f"{type(self).__name__}: its weights do not fit tokens of width {width}",
                block=block.index,
            )
        return [held[name] for name in shapes]

    @classmethod
    def fields_from(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Fields as :meth:`to_dict` wrote them, back in their own types."""
        fields = super().fields_from(data)
        if isinstance(policy := fields.get("policy"), dict):
            fields["policy"] = Policy.from_json_types(policy)
        return fields


@dataclass(frozen=True, repr=False, kw_only=True)
class DynamicViT(Learned):
    """DynamicViT, arXiv 2106.02034: a small prediction module says which tokens stay.

    After the attention of each block that reduces, the module scores every token from its own
    features and from the mean over all, and those with the highest scores after a draw are kept.

    Args:
        policy: the weights, made by :func:`tomepass.train_policy`. None: not trained yet.

    The other arguments are those of :class:`Method`; by default 0.7 of the tokens are kept after
    a quarter, a half and three quarters of the depth.
    """

    name: ClassVar[str] = "dynamicvit"
    read_out: ClassVar[tuple[str, ...]] = ("out.weight",)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The norm and four linear layers of the prediction module."""
        half, quarter = width // 2, max(1, width // 4)
        return {
            "norm.weight": (width,),
            "norm.bias": (width,),
            "embed.weight": (2 * half, width),
            "embed.bias": (2 * half,),
            "mix.weight": (half, 2 * half),
            "mix.bias": (half,),
            "narrow.weight": (quarter, half),
            "narrow.bias": (quarter,),
            "out.weight": (2, quarter),
            "out.bias": (2,),
        }

    def score(
        self, block: ReducingBlock, weights: Sequence[fx.Node], size: fx.Node | None
    ) -> fx.Node:
        """The difference of the two logits."""
        return block.call("keep_score", block.hidden, size, list(weights), block.protected)


@dataclass(frozen=True, repr=False, kw_only=True)
class AdaViT(Learned):
    """The token policy of AdaViT, arXiv 2111.15668: each image keeps as many tokens as it needs.

    After the attention of each block that reduces, a linear layer gives every token a probability
    of being kept, from its own features and the class token's, both normalised. What a draw does
    not keep is out of use from there on: no other token attends to it. The counts of the plan are
    a capacity: of more tokens in use those with the highest odds are kept. The heads and blocks
    that the paper also skips are not.

    Args:
        policy: the weights, made by :func:`tomepass.train_policy`. None: not trained yet.

    The other arguments are those of :class:`Method`; by default the capacity is 0.7 of the tokens
    after a quarter, a half and three quarters of the depth.
    """

    name: ClassVar[str] = "adavit"
    holes: ClassVar[bool] = True
    counted: ClassVar[bool] = False
    read_out: ClassVar[tuple[str, ...]] = ("token.weight", "class.weight")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """A norm, a linear layer on the token and one on the class token."""
        return {
            "norm.weight": (width,),
            "norm.bias": (width,),
            "token.weight": (1, width),
            "class.weight": (1, width),
            "bias": (1,),
        }

    def score(
        self, block: ReducingBlock, weights: Sequence[fx.Node], size: fx.Node | None
    ) -> fx.Node:
        """The logit of the probability."""
        return block.call("keep_score_linear", block.hidden, size, list(weights), block.protected)

    def kept(self, block: ReducingBlock, score: fx.Node) -> Reduction:
        """The highest odds, what the draw did not keep out of use."""
        before, held = block.masked_size, block.protected
        stands = block.call("select", score, block.left, held, before)
        return block.pruned(stands, block.call("used_size", score, before, stands, held))
