"""Plain references of reduction methods, written from the papers: one image at a time, in Python.

A rule takes what a block of one image shows (:class:`Seen`) and answers which tokens there are
afterwards (:class:`Group`). :func:`encode` runs a whole encoder by such a rule. Nothing here is
shared with the package but :mod:`tomepass.reference`'s attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from reference_models import Block, Result, attend
from torch import Tensor

from tomepass import reference


class Seen(NamedTuple):
    """One image in one block, in float64; `memory` is the rule's own, from block to block."""

    q: Tensor  # [H, N, D]
    k: Tensor
    v: Tensor
    hidden: Tensor  # [N, C], after the attention's residual
    size: Tensor  # [N], 0 for what is out of use
    weights: Tensor  # [H, N, N] of the attention
    protected: int  # the first tokens, in the first block too
    left: int  # tokens the block must leave
    index: int
    depth: int
    memory: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def free(self) -> list[int]:
        return list(range(self.protected, self.tokens))

    @property
    def class_attention(self) -> Tensor:
        """[N], of the first protected token, or the mean over all."""
        rows = self.weights[:, :1] if self.protected else self.weights
        return rows.mean((0, 1))

    @property
    def cosines(self) -> Tensor:
        """[N, N], of the keys' head mean."""
        return cosines(self.k.mean(0))


class Group(NamedTuple):
    """One token afterwards: the position that stands there, whose values it is made of, by which
    weights, what it counts, and how: "mean", "mlerp" (greatest norm) or "keep" (the stand's)."""

    stand: int
    members: Sequence[int]
    weights: Sequence[float]
    size: float
    how: str = "mean"


Rule = Callable[[Seen], list[Group]]


def cosines(x: Tensor) -> Tensor:
    directions = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return directions @ directions.T


def alone(seen: Seen, position: int, how: str = "mean") -> Group:
    """A token that stays as it is."""
    return Group(position, [position], [1.0], float(seen.size[position]), how)


def together(seen: Seen, stand: int, members: Sequence[int], how: str = "mean") -> Group:
    """Tokens made one, weighted by size."""
    weights = [float(seen.size[i]) for i in members]
    return Group(stand, members, weights, sum(weights), how)


def best(score: Tensor, among: Sequence[int], count: int) -> list[int]:
    """The `count` positions of the highest scores, ascending; ties to the lower position."""
    return sorted(sorted(among, key=lambda i: (-float(score[i]), i))[:count])


def encode(
    x: Tensor,
    blocks: Iterable[Block],
    norm: Callable[[Tensor], Tensor],
    left: Sequence[int],
    protected: int,
    rule: Rule,
    prop_attn: bool,
) -> Result:
    """Blocks and final norm over embedded tokens `[B, N, C]`; `left`: tokens after each block."""
    images, tokens, _ = x.shape
    blocks = list(blocks)
    size = torch.ones(images, tokens)
    source = torch.arange(tokens).repeat(images, 1)
    memory: list[dict[str, Any]] = [{} for _ in range(images)]
    for index, (block, goal) in enumerate(zip(blocks, left, strict=True)):
        counted = size if prop_attn else (size > 0).float()
        update, q, k, v = attend(block.attention, block.norm1(x), counted)
        x = x + block.scale1(update)
        if goal < x.shape[1]:
            made = []
            for i in range(images):
                weights = _weights(q[i], k[i], counted[i], block.attention.scale)
                parts = (t[i].double() for t in (q, k, v, x, size))
                seen = Seen(*parts, weights, protected, goal, index, len(blocks), memory[i])
                groups = rule(seen)
                assert len(groups) == goal, (len(groups), goal)
                made.append(_reduced(seen, groups))
            source = torch.stack([m[2][s] for m, s in zip(made, source, strict=True)])
            x = torch.stack([m[0] for m in made]).to(x.dtype)
            size = torch.stack([m[1] for m in made])
        x = x + block.scale2(block.mlp(block.norm2(x)))
    hidden = norm(x)
    return Result(hidden, hidden, size, source, list(left), torch.full((images,), math.inf))


def _weights(q: Tensor, k: Tensor, size: Tensor, scale: float) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return reference.proportional_weights(scores[None], size[None])[0]


def _reduced(seen: Seen, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    rows, places = [], torch.full((seen.tokens,), -1)
    for place, group in enumerate(groups):
        members = list(group.members)
        places[members] = place
        if group.how == "keep" or not members:
            rows.append(seen.hidden[group.stand])
            continue
        weights = torch.tensor(group.weights, dtype=torch.float64)[:, None]
        x = seen.hidden[members]
        mean = (weights * x).sum(0) / weights.sum().clamp(min=1e-300)
        if group.how == "mlerp" and len(members) > 1:
            mean = mean / mean.norm() * x.norm(dim=-1).max()
        rows.append(mean)
    # What was dropped is found again at the most similar token that is in use.
    similar = seen.cosines
    for position in range(seen.tokens):
        if places[position] < 0:
            usable = [p for p, g in enumerate(groups) if g.stand >= seen.protected and g.size > 0]
            near = [float(similar[position, groups[p].stand]) for p in usable]
            places[position] = usable[near.index(max(near))]
    size = torch.tensor([float(group.size) for group in groups])
    return torch.stack(rows), size, places


# ---- rules -----------------------------------------------------------------------------------


def prune(score: Callable[[Seen], Tensor]) -> Rule:
    """Keeps the highest scores."""

    def rule(seen: Seen) -> list[Group]:
        kept = best(score(seen), seen.free, seen.left - seen.protected)
        return [alone(seen, i, "keep") for i in [*range(seen.protected), *kept]]

    return rule


def shuffled(seen: Seen, seed: int) -> Tensor:
    """The scores of random pruning."""
    import random

    prime = seen.tokens + 1
    while any(prime % d == 0 for d in range(2, prime)):
        prime += 1
    drawn = random.Random(seed + seen.index)
    step, start = drawn.randrange(1, prime), drawn.randrange(prime)
    return torch.tensor([(i * step + start) % prime for i in range(1, seen.tokens + 1)])


# ---- learned policies --------------------------------------------------------------------------

Weights = dict[int, dict[str, Tensor]]


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def keep_probability(seen: Seen, w: dict[str, Tensor]) -> Tensor:
    """DynamicViT's prediction module, eq. 1 to 5: the probability of keeping each token."""
    layer = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    gelu = lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2)))  # noqa: E731
    w = {name: tensor.double() for name, tensor in w.items()}
    features = gelu(layer(normalised(seen.hidden, w["norm.weight"], w["norm.bias"]), "embed"))
    half = features.shape[1] // 2
    shared = features[seen.free, half:].mean(0)
    rows = torch.stack([torch.cat([row[:half], shared]) for row in features])
    logits = layer(gelu(layer(gelu(layer(rows, "mix")), "narrow")), "out")
    return logits.softmax(-1)[:, 0]


def dynamicvit(weights: Weights) -> Rule:
    return prune(lambda seen: keep_probability(seen, weights[seen.index]))


def adavit(weights: Weights) -> Rule:
    """A linear policy; of at most so many tokens those below one half are out of use."""

    def rule(seen: Seen) -> list[Group]:
        w = {name: tensor.double() for name, tensor in weights[seen.index].items()}
        x = normalised(seen.hidden, w["norm.weight"], w["norm.bias"])
        used = [i for i in seen.free if seen.size[i] > 0]
        other = x[0] if seen.protected else x[used].mean(0)
        logit = (x * w["token.weight"]).sum(-1) + (other * w["class.weight"]).sum() + w["bias"]
        score = torch.full_like(logit, -math.inf)
        score[used] = 1 / (1 + torch.exp(-logit[used]))
        kept = best(score, seen.free, seen.left - seen.protected)
        stays = {i for i in kept if score[i] >= 0.5} | set(best(score, kept, 1))
        tokens = [alone(seen, i, "keep") for i in range(seen.protected)]
        return tokens + [
            alone(seen, i, "keep") if i in stays else Group(i, [], [], 0.0) for i in kept
        ]

    return rule
