"""Encoders one step from a plain one: each must be merged exactly, or refused.

model = near_miss("rolled", place=1)     # three blocks, the second of which rolls its tokens
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from encoders import (
    GRID,
    HEADS,
    PATCHES,
    Attention,
    Block,
    ByHand,
    Encoder,
    make,
    with_attention,
)
from torch import Tensor, nn

WIDTH = 16


def near_miss(name: str, place: int = 1, **choices: Any) -> nn.Module:
    """Three blocks, one of them a near miss; or an encoder that goes through them otherwise."""
    found = NEAR_MISSES[name]
    if issubclass(found, Encoder):
        return make(found, **{"depth": 3, **choices})
    makers: list[Callable[[int], nn.Module]] = [Block, Block, Block]
    makers[place] = found if issubclass(found, Block) else lambda w: with_attention(found, w)
    return make(blocks=makers, **choices)


# ---- attention -------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


class TalkingHeads(ByHand):
    """Heads are mixed before the softmax and after it."""

    bias = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.before, self.after = (nn.Linear(HEADS, HEADS, bias=self.bias) for _ in range(2))

    def mixed(self, x: Tensor, mixer: nn.Module) -> Tensor:
        return mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.mixed(scores(q, k), self.before).softmax(-1)
        return self.mixed(weights, self.after) @ v


class TalkingHeadsWithBias(TalkingHeads):
    bias = True


class EinsumHeads(TalkingHeads):
    def mixed(self, x: Tensor, mixer: nn.Module) -> Tensor:
        return torch.einsum("bhnm,gh->bgnm", x, mixer.weight)


class ConvolvedHeads(ByHand):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.conv = nn.Conv2d(HEADS, HEADS, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.conv(scores(q, k).softmax(-1)) @ v


class NormalisedHeads(TalkingHeads):
    """Heads are mixed, then normalised among themselves, as in DeepViT's re-attention."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.LayerNorm(HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.mixed(scores(q, k).softmax(-1), self.after)
        return self.mixed(weights, self.norm) @ v


class SquaredWeights(ByHand):
    """A weight times itself: twice the weight is four times the result."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        return (weights * weights) @ v


class MeanOfHeads(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).softmax(-1).mean(1, keepdim=True) @ v


class GatedHeads(ByHand):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = nn.Parameter(torch.randn(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k).softmax(-1) * self.gate.sigmoid()) @ v


class GatedQueries(ByHand):
    """Each query's weights are scaled by something read off the query."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k).softmax(-1) * q.mean(-1, keepdim=True).sigmoid()) @ v


class GatedKeys(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate = k.mean(-1).sigmoid().unsqueeze(-2)
        return (scores(q, k).softmax(-1) * gate) @ v


class GatedScores(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) * k.mean(-1).sigmoid().unsqueeze(-2)).softmax(-1) @ v


class GateOfPositions(ByHand):
    """A learned gate, one a query."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = nn.Parameter(torch.randn(37, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k).softmax(-1) * self.gate.sigmoid()) @ v


class GatedOutput(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.q(x).sigmoid()


class Sigmoid(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) - 3.6).sigmoid() @ v


class SharpenedWeights(ByHand):
    """The weights are cubed and made to sum to one again."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1) ** 3
        return weights / weights.sum(-1, keepdim=True) @ v


class Renormalised(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        return weights / weights.sum(-1, keepdim=True) @ v


class Stabilised(ByHand):
    """The largest score of a row is subtracted first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = scores(q, k)
        return (found - found.amax(-1, keepdim=True)).softmax(-1) @ v


class Exponentials(ByHand):
    """A softmax written out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = (scores(q, k) * 0.1).exp()
        return found / found.sum(-1, keepdim=True) @ v


class SoftmaxPlusOne(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = F.pad(scores(q, k), (1, 0))
        return found.softmax(-1)[..., 1:] @ v


class Capped(ByHand):
    """Scores are softly capped."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (5 * torch.tanh(scores(q, k) / 5)).softmax(-1) @ v


class CentredKeys(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k - k.mean(2, keepdim=True)).softmax(-1) @ v


class TopKeys(ByHand):
    """All but the four best keys are hidden."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = scores(q, k)
        least = found.topk(4, dim=-1).values[..., -1:]
        return found.masked_fill(found < least, -torch.inf).softmax(-1) @ v


class OverQueries(ByHand):
    """A softmax over the queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).softmax(-2) @ v


class WeightsTransposed(ByHand):
    """Weights sum to one over the keys, and the queries are summed."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).softmax(-1).transpose(-1, -2) @ v


class WeightsTwice(ByHand):
    """Two steps of attention with the same weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        return weights @ (weights @ v)


class TwoValues(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        return weights @ v + weights @ q


class DifferentialWeights(ByHand):
    """The difference of two softmaxes, as in differential transformers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = q.chunk(2, -1), k.chunk(2, -1)
        one, two = (scores(a, b).softmax(-1) for a, b in zip(first, second, strict=True))
        return (one - 0.4 * two) @ v


class SharedQK(Attention):
    """The queries are the keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(k, k, v)


class SharedAll(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(v, v, v)


class OneProduct(ByHand):
    """Values that are not projected."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, _ = self.heads(x)
        v = x.view(batch, tokens, HEADS, -1).transpose(1, 2)
        return self.attend(q, k, v).transpose(1, 2).reshape(x.shape)


class OneKeyHead(Attention):
    """Multi-query attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


class RepeatedKeyHead(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :1].repeat_interleave(HEADS, 1) for t in (k, v))
        return super().attend(q, k, v)


class MaskFromScores(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = scores(q, k)
        return found.masked_fill(found < -1, -1e9).softmax(-1) @ v


class MaskOfKeys(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = k.mean(-1).unsqueeze(-2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class NullKey(Attention):
    """One key more than there are tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, 1, 0)) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class PooledKeys(Attention):
    """Every second key and value."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])


class ClassQueries(Attention):
    """The class token alone asks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, :1], k, v).expand_as(q)


class KeyOfNeighbour(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.roll(1, 2), v.roll(1, 2))


class ConvolvedValues(Attention):
    """The values of neighbours are added to what attention finds, as in CoaT."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.conv(self.v(x).transpose(1, 2)).transpose(1, 2)


class MixedOverTokens(Attention):
    """A softmax of the keys over the tokens: linear attention that can be merged."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v)
        return y + q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


class SumOfValues(Attention):
    """Something that counts the tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) + 0.1 * v.sum(2, keepdim=True)


class SecondMoment(Attention):
    """Linear attention beside the softmax's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v)
        return y + 0.1 * q @ (k.transpose(-1, -2) @ v)


# ---- blocks ----------------------------------------------------------------------------------


class AttentionTwice(Block):
    """The attention's output is added again after the MLP."""

    def forward(self, x: Tensor) -> Tensor:
        update = self.attention(self.norm1(x))
        x = x + update
        return x + self.mlp(self.norm2(x)) + update


class SubtractedUpdate(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x - self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Rolled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, 1)


class RolledChannels(Block):
    """Half of the channels are shifted along the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = super().forward(x).chunk(2, -1)
        return torch.cat([left, right.roll(1, 1)], dim=-1)


class ConvolvedMlp(Block):
    """A depthwise convolution inside the MLP, as in PVT and CeiT."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        grid = y[:, -PATCHES:].transpose(1, 2).unflatten(2, (GRID, GRID))
        found = self.conv(grid).flatten(2).transpose(1, 2)
        first = y[:, :-PATCHES]
        found = torch.cat([first, found], dim=1) if first.shape[1] else found
        return x + self.mlp(found)


class MixedTokens(Block):
    """An MLP over the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.tokens = nn.Linear(1 + PATCHES, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        y = self.tokens(x.transpose(1, 2)).mean(-1)
        return x + y[:, None]


class SlicedByPosition(Block):
    """The mean of some tokens, found by position, is added to all."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + x[:, 5:9].mean(1, keepdim=True)


class EverySecond(Block):
    """Every second token is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.stack([x[:, :36:2], 0.5 * x[:, 1:36:2]], 2).flatten(1, 2)


class ByContent(Block):
    """The token with the largest first channel is added to all."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        best = x[..., :1].argmax(1, keepdim=True).expand(-1, -1, x.shape[2])
        return x + x.gather(1, best)


class NormalisedOverTokens(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + F.instance_norm(x.transpose(1, 2)).transpose(1, 2)


class Whitened(Block):
    """Tokens are centred by their mean."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True))


class PositionGate(Block):
    """A learned scale, one a token; equal ones here."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Parameter(torch.full((37, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class OwnMlpOfClass(Block):
    """The class token has an MLP of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.other = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.cat([self.other(x[:, :1]), x[:, 1:]], dim=1)


class ClassFromMean(Block):
    """The class token gets the mean of the patches."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        first, rest = x[:, :1], x[:, 1:]
        return torch.cat([first + rest.mean(1, keepdim=True), rest], dim=1)


class ClassLast(Block):
    """The first token goes to the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.cat([x[:, 1:], x[:, :1]], dim=1)


class TwoTokensInOne(Block):
    """A protected token and a patch are read together."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.cat([x[:, :2] * 2, x[:, 2:]], dim=1)


class TwoAttentions(Block):
    """Two attentions beside each other."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.second = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y) + self.second(y)
        return x + self.mlp(self.norm2(x))


class AttentionOfAttention(Block):
    """One attention reads another without a sum between."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.second = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class ChannelAttention(Block):
    """XCiT's: channels attend to channels, over all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        q, k = F.normalize(self.q(x), dim=1), F.normalize(self.k(x), dim=1)
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return x + (weights @ x.transpose(1, 2)).transpose(1, 2)


class Reverted(Block):
    """The tokens take another path through a folded batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.mlp(x.reshape(-1, WIDTH)).view(x.shape) + x


# ---- encoders --------------------------------------------------------------------------------


class KeysOf(Attention):
    """An attention that hands out what it computed, or takes what another one did."""

    def forward(self, x: Tensor, given: tuple[Tensor, ...] | None = None) -> Any:
        q, k, v = self.heads(x)
        if given is not None:
            k, v = given
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape)), k, v


class WithKeys(Encoder):
    """An encoder whose attentions show their keys."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        for block in self.blocks:
            block.attention = KeysOf(WIDTH)

    def halves(self, block: Any, x: Tensor, update: Tensor) -> Tensor:
        x = x + update
        return x + block.mlp(block.norm2(x))


class KeysReturned(WithKeys):
    def forward(self, pixels: Tensor) -> Any:
        x, keys = self.embed(pixels), []
        for block in self.blocks:
            update, k, _ = block.attention(block.norm1(x))
            keys.append(k)
            x = self.halves(block, x, update)
        return self.read(self.final(x)), keys


class KeysInHead(WithKeys):
    """The head reads the mean of the last keys."""

    def forward(self, pixels: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            update, k, _ = block.attention(block.norm1(x))
            x = self.halves(block, x, update)
        return self.read(self.final(x)), k.mean(2)


class KeysInNext(WithKeys):
    """The next block adds the keys of the one before."""

    def forward(self, pixels: Tensor) -> Any:
        x, before = self.embed(pixels), None
        for block in self.blocks:
            update, k, _ = block.attention(block.norm1(x))
            if before is not None:
                update = update + before.transpose(1, 2).flatten(2)
            before = k
            x = self.halves(block, x, update)
        return self.read(self.final(x))


class KeysReused(WithKeys):
    """The last block attends to the keys and values of the first."""

    def forward(self, pixels: Tensor) -> Any:
        x, early = self.embed(pixels), None
        for block in self.blocks:
            given = early if block is self.blocks[-1] else None
            update, k, v = block.attention(block.norm1(x), given)
            early = early or (k, v)
            x = self.halves(block, x, update)
        return self.read(self.final(x))


class ByHandWith(Attention):
    """An attention that takes the scores or weights of the one before, and hands out its own."""

    def forward(self, x: Tensor, before: Tensor | None = None, weights: Any = None) -> Any:
        q, k, v = self.heads(x)
        found = scores(q, k)
        found = found if before is None else found + 0.5 * before
        weights = found.softmax(-1) if weights is None else weights
        y = (weights @ v).transpose(1, 2).reshape(x.shape)
        return self.out(y), found, weights


class WithScores(WithKeys):
    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        for block in self.blocks:
            block.attention = ByHandWith(WIDTH)

    def run(self, pixels: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, scores, weights = self.embed(pixels), [], []
        for block in self.blocks:
            update, score, weight = block.attention(block.norm1(x), *self.given(scores, weights))
            scores.append(score)
            weights.append(weight)
            x = self.halves(block, x, update)
        return self.final(x), scores, weights

    def given(self, scores: list[Tensor], weights: list[Tensor]) -> tuple[Any, ...]:
        return ()

    def forward(self, pixels: Tensor) -> Any:
        x, _, weights = self.run(pixels)
        return self.read(x), weights


class WeightsReturned(WithScores):
    pass


class ScoresReturned(WithScores):
    def forward(self, pixels: Tensor) -> Any:
        x, scores, _ = self.run(pixels)
        return self.read(x), scores


class ClassWeightsReturned(WithScores):
    def forward(self, pixels: Tensor) -> Any:
        x, _, weights = self.run(pixels)
        return self.read(x), weights[-1][:, :, 0, 1:]


class WeightsSummed(WithScores):
    """How much each token is attended to."""

    def forward(self, pixels: Tensor) -> Any:
        x, _, weights = self.run(pixels)
        return self.read(x), [w.sum(-2) for w in weights], weights[1].sum(-1)


class Rollout(WithScores):
    """Weights of all blocks multiplied."""

    def forward(self, pixels: Tensor) -> Any:
        x, _, weights = self.run(pixels)
        rolled = weights[0]
        for w in weights[1:]:
            rolled = w @ rolled
        return self.read(x), rolled


class WeightsPooled(WithScores):
    """The last tokens are pooled by how much the first one attended to them."""

    def forward(self, pixels: Tensor) -> Any:
        x, _, weights = self.run(pixels)
        return (weights[-1].mean(1)[:, :1] @ x).squeeze(1)


class WeightsOfWeights(WithScores):
    """All tokens are mixed once more by the last weights."""

    def forward(self, pixels: Tensor) -> Any:
        x, _, weights = self.run(pixels)
        return self.read(weights[-1].mean(1) @ x)


class RealFormer(WithScores):
    """Scores are added to those of the block before."""

    def given(self, scores: list[Tensor], weights: list[Tensor]) -> tuple[Any, ...]:
        return (scores[-1],) if scores else ()


class RealFormerAtLast(WithScores):
    def given(self, scores: list[Tensor], weights: list[Tensor]) -> tuple[Any, ...]:
        return (scores[-1],) if len(scores) == 2 else ()


class WeightsReused(WithScores):
    """Weights of the first block serve the second too."""

    def given(self, scores: list[Tensor], weights: list[Tensor]) -> tuple[Any, ...]:
        return (None, weights[0]) if len(weights) == 1 else ()


class AddedTokens(Encoder):
    """Two tokens more after the first block, a prompt as deep as that."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.prompt = nn.Parameter(torch.randn(1, 2, WIDTH))

    def forward(self, pixels: Tensor) -> Any:
        x = self.blocks[0](self.embed(pixels))
        x = torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks[1:]:
            x = block(x)
        return self.read(self.final(x))


class ReplacedPrompts(AddedTokens):
    """The first two tokens are replaced before every block: deep prompts."""

    def forward(self, pixels: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            x = torch.cat([self.prompt.expand(x.shape[0], -1, -1), x[:, 2:]], dim=1)
            x = block(x)
        return self.read(self.final(x))


class DroppedClass(Encoder):
    """The class token goes after the first block."""

    def forward(self, pixels: Tensor) -> Any:
        x = self.blocks[0](self.embed(pixels))[:, 1:]
        for block in self.blocks[1:]:
            x = block(x)
        return self.read(self.final(x))


class HalvedGrid(Encoder):
    """Four tokens become one after the first block."""

    def forward(self, pixels: Tensor) -> Any:
        x = self.blocks[0](self.embed(pixels))
        grid = x[:, -PATCHES:].transpose(1, 2).unflatten(2, (GRID, GRID))
        x = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
        for block in self.blocks[1:]:
            x = block(x)
        return self.read(self.final(x))


class ClassLate(Encoder):
    """CaiT's: the class token comes after the blocks and attends to the patches alone."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.late, self.layer = nn.Parameter(torch.randn(1, 1, WIDTH)), Attention(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        token = self.late.expand(x.shape[0], -1, -1)
        everything = self.norm(torch.cat([token, x], dim=1))
        _, k, v = self.layer.heads(everything)
        q, _, _ = self.layer.heads(everything[:, :1])
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((token + self.layer.out(y))[:, 0])


class Skipped(Encoder):
    """A long skip: what left the first block is joined to what enters the last, as in UViT."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.skip = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Any:
        early = self.blocks[0](self.embed(pixels))
        x = self.blocks[1](early)
        x = self.skip(torch.cat([x, early], dim=-1))
        return self.read(self.final(self.blocks[2](x)))


class Ensembled(Encoder):
    """Every block has an exit of its own."""

    def forward(self, pixels: Tensor) -> Any:
        x, exits = self.embed(pixels), []
        for block in self.blocks:
            x = block(x)
            exits.append(self.read(self.final(x)))
        return torch.stack(exits).mean(0), exits


class DenseGate(Encoder):
    """Layer attention: the stream is a weighted sum of all blocks so far."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.shares = nn.Parameter(torch.randn(4))

    def forward(self, pixels: Tensor) -> Any:
        states = [self.embed(pixels)]
        for i, block in enumerate(self.blocks):
            shares = self.shares[: i + 1].softmax(0)
            states.append(block(sum(s * x for s, x in zip(shares, states, strict=True))))
        return self.read(self.final(states[-1]))


class PaddedMask(Encoder):
    """Tokens whose patch is dark are hidden from everyone."""

    def forward(self, pixels: Tensor) -> Any:
        x = self.embed(pixels)
        mask = (x[..., 0] > 0)[:, None, None, :]
        for block in self.blocks:
            q, k, v = block.attention.heads(block.norm1(x))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.attention.out(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return self.read(self.final(x))


_HELPERS = {WithKeys, WithScores, KeysOf, ByHandWith}
NEAR_MISSES: dict[str, type[Any]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type)
    and issubclass(value, (Attention, Block, Encoder))
    and value.__module__ == __name__
    and value not in _HELPERS
}
"""By class name."""
