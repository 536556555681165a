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
        """[N], of the first protected token, or the mean over all in use."""
        rows = self.weights[:, :1] if self.protected else self.weights[:, self.size > 0]
        return rows.mean((0, 1))

    @property
    def cosines(self) -> Tensor:
        """[N, N], of the keys' head mean."""
        return cosines(self.k.mean(0))


class Group(NamedTuple):
    """One token afterwards: the position that stands there, whose values it is made of, by which
    weights, what it counts, and how: "mean", "mlerp" (greatest norm), "mlerp_mean" (mean norm),
    "max" (of each channel) or "keep" (the stand's)."""

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
    every_block: bool = False,
) -> Result:
    """Blocks and final norm over embedded tokens `[B, N, C]`; `left`: tokens after each block;
    `every_block`: the rule sees those that lose none, too."""
    images, tokens, _ = x.shape
    blocks = list(blocks)
    size = torch.ones(images, tokens)
    source = torch.arange(tokens).repeat(images, 1)
    memory: list[dict[str, Any]] = [{} for _ in range(images)]
    for index, (block, goal) in enumerate(zip(blocks, left, strict=True)):
        counted = size if prop_attn else (size > 0).float()
        update, q, k, v = attend(block.attention, block.norm1(x), counted)
        x = x + block.scale1(update)
        if goal < x.shape[1] or every_block:
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
        norms = x.norm(dim=-1, keepdim=True)
        if group.how == "mlerp" and len(members) > 1:
            mean = mean / mean.norm() * norms.max()
        if group.how == "mlerp_mean" and len(members) > 1:
            mean = (weights * x / norms).sum(0)
            mean = mean / mean.norm() * (weights * norms).sum() / weights.sum()
        rows.append(x.max(0).values if group.how == "max" else mean)
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


def shuffle(count: int, seed: int) -> list[int]:
    """Distinct numbers, one for each of so many."""
    import random

    prime = count + 1
    while any(prime % d == 0 for d in range(2, prime)):
        prime += 1
    drawn = random.Random(seed)
    step, start = drawn.randrange(1, prime), drawn.randrange(prime)
    return [(i * step + start) % prime for i in range(1, count + 1)]


def shuffled(seen: Seen, seed: int) -> Tensor:
    """The scores of random pruning."""
    return torch.tensor(shuffle(seen.tokens, seed + seen.index))


def fused(score: Callable[[Seen], Tensor]) -> Rule:
    """Keeps the highest scores, and one token of the rest, their mean by score."""

    def rule(seen: Seen) -> list[Group]:
        values = score(seen)
        kept = best(values, seen.free, seen.left - seen.protected - 1)
        rest = [i for i in seen.free if i not in kept]
        weights = [float(values[i]) for i in rest]
        (stand,) = best(values, rest, 1)
        total = sum(float(seen.size[i]) for i in rest)
        singles = [alone(seen, i) for i in [*range(seen.protected), *kept]]
        return [*singles, Group(stand, rest, weights, total)]

    return rule


FEATURES: dict[str, Callable[[Seen], Tensor]] = {
    "keys": lambda seen: seen.k.mean(0),
    "queries": lambda seen: seen.q.mean(0),
    "values": lambda seen: seen.v.mean(0),
    "keys_all_heads": lambda seen: torch.cat(list(seen.k), dim=-1),
    "hidden": lambda seen: seen.hidden,
}
LIKENESS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": cosines,
    "dot": lambda x: x @ x.T,
    "euclidean": lambda x: -(x[:, None] - x).square().sum(-1),
}


def _edges(
    similar: Tensor, sources: Sequence[int], destinations: Sequence[int], r: int
) -> dict[int, int]:
    """The r sources most similar to a destination, and which."""
    alike = similar.tolist()
    near = {s: max(destinations, key=lambda d: alike[s][d]) for s in sources}
    order = sorted(sources, key=lambda s: -alike[s][near[s]])
    return {s: near[s] for s in order[:r]}


def _merged(seen: Seen, into: dict[int, int], order: Sequence[int], how: str) -> list[Group]:
    """Tokens in an order, each with those that go to it."""
    groups = []
    for position in order:
        if position not in into:
            members = [position, *(s for s, d in into.items() if d == position)]
            groups.append(together(seen, position, sorted(members), how))
    return groups


def tome(
    feature: str = "keys",
    likeness: str = "cosine",
    combine: str = "weighted_mean",
    partition: str = "alternating",
    seed: int = 0,
    exponent: float = 0.0,
) -> Rule:
    """ToMe, arXiv 2210.09461, section 3 and table 1; an edge is the dearer, the more the class
    token looks at its source, to a power."""

    def rule(seen: Seen) -> list[Group]:
        sources, destinations = _halves(seen, partition, seed)
        x = FEATURES[feature](seen)
        if likeness == "softmax":  # what attention would give each destination
            alike = torch.zeros(seen.tokens, seen.tokens).double()
            scores = x @ x[destinations].T / x.shape[1] ** 0.5
            alike[:, destinations] = scores.softmax(-1)
        else:
            alike = LIKENESS[likeness](x)
        into = _edges(alike, sources, destinations, len(sources))
        apart = 1.0 if likeness == "cosine" else 0.0
        cost = {s: apart - float(alike[s, d]) for s, d in into.items()}
        if exponent:
            cost = {s: c * float(seen.class_attention[s]) ** exponent for s, c in cost.items()}
        cheap = sorted(into, key=lambda s: cost[s])[: seen.tokens - seen.left]
        order = [*range(seen.protected), *sources, *destinations]
        made = _merged(seen, {s: into[s] for s in cheap}, order, combine)
        if combine == "mean":  # that of tokens, whatever they hold
            made = [group._replace(weights=[1.0] * len(group.members)) for group in made]
        return made

    return rule


def _halves(seen: Seen, partition: str, seed: int) -> tuple[list[int], list[int]]:
    """Sources and destinations, ascending."""
    free, half = seen.free, (len(seen.free) + 1) // 2
    if partition == "alternating":
        return [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    if partition == "random":
        numbers = dict(zip(free, shuffle(len(free), seed), strict=True))
        free = sorted(free, key=lambda i: numbers[i])
    return sorted(free[:half]), sorted(free[half:])


def tofu(strategies: Sequence[str], how: str = "mlerp") -> Rule:
    """Edges as in ToMe; the sources are dropped, or merged by MLERP."""

    def rule(seen: Seen) -> list[Group]:
        even = [i for i in seen.free if i % 2 == 0]
        odd = [i for i in seen.free if i % 2 == 1]
        into = _edges(seen.cosines, even, odd, seen.tokens - seen.left)
        order = [*range(seen.protected), *even, *odd]
        if strategies[seen.index] == "merge":
            return _merged(seen, into, order, how)
        return [alone(seen, i, "keep") for i in order if i not in into]

    return rule


def pitome(first: float = 0.75) -> Rule:
    """Sources and destinations by falling energy; late blocks take the highest 2r alone."""

    def rule(seen: Seen) -> list[Group]:
        margin, cosines = first - first * seen.index / seen.depth, seen.cosines.tolist()
        energy = {}
        for i in seen.free:
            gaps = [cosines[i][j] - margin for j in seen.free if j != i]
            energy[i] = sum(gap if gap > 0 else math.exp(gap) - 1 for gap in gaps) / len(gaps)
        r = seen.tokens - seen.left
        order = sorted(seen.free, key=lambda i: -energy[i])
        if seen.index >= seen.depth // 2:
            order = order[: 2 * r]
        into = _edges(seen.cosines, order[0::2], order[1::2], r)
        return _merged(seen, into, range(seen.tokens), "mean")

    return rule


def diffrate(pruned: Callable[[int, int], int]) -> Rule:
    """By falling class attention: a head that stays, some merged into it, a tail that goes."""

    def rule(seen: Seen) -> list[Group]:
        r = seen.tokens - seen.left
        order = sorted(seen.free, key=lambda i: -float(seen.class_attention[i]))
        head, gone = order[: len(order) - r], pruned(seen.index, r)
        merging = order[len(head) : len(order) - gone]
        into = _edges(cosines(seen.hidden), merging, head, len(merging))
        tail = set(order[len(order) - gone :])
        stay = [i for i in range(seen.tokens) if i not in tail]
        return _merged(seen, into, stay, "mean")

    return rule


def greedy(feature: str = "keys", likeness: str = "cosine") -> Rule:
    """The most similar pair of all, then of the rest; the higher position goes to the lower."""

    def rule(seen: Seen) -> list[Group]:
        alike = LIKENESS[likeness](FEATURES[feature](seen)).tolist()
        into: dict[int, int] = {}
        pairs = [(i, j) for i in seen.free for j in seen.free if i < j]
        for low, high in sorted(pairs, key=lambda pair: -alike[pair[0]][pair[1]]):
            used = {*into, *into.values()}
            if len(into) < seen.tokens - seen.left and not {low, high} & used:
                into[high] = low
        return _merged(seen, into, range(seen.tokens), "mean")

    return rule


def kmeans(iterations: int, feature: str = "keys", likeness: str = "cosine") -> Rule:
    """Clusters around evenly spaced tokens, which stay in them."""

    def rule(seen: Seen) -> list[Group]:
        x = FEATURES[feature](seen)
        if likeness == "cosine":
            x = x / x.norm(dim=-1, keepdim=True)
        clusters = seen.left - seen.protected
        seeds = [seen.free[i * len(seen.free) // clusters] for i in range(clusters)]
        centres = x[seeds]
        for _ in range(iterations):
            members: list[list[int]] = [[seed] for seed in seeds]
            near = LIKENESS[likeness](torch.cat([x, centres]))[: seen.tokens, seen.tokens :]
            for i in seen.free:
                if i not in seeds:
                    members[int(near[i].argmax())].append(i)
            centres = torch.stack([x[m].mean(0) for m in members])
        singles = [alone(seen, i) for i in range(seen.protected)]
        clustered = zip(seeds, members, strict=True)
        return [*singles, *(together(seen, seed, m) for seed, m in clustered)]

    return rule


def kth(k: int) -> Rule:
    """Every k-th token is a destination, all others are sources."""

    def rule(seen: Seen) -> list[Group]:
        destinations = seen.free[k - 1 :: k]
        sources = [i for i in seen.free if i not in destinations]
        into = _edges(seen.cosines, sources, destinations, seen.tokens - seen.left)
        return _merged(seen, into, [*range(seen.protected), *sources, *destinations], "mean")

    return rule


def hole(stand: int) -> Group:
    """A place out of use."""
    return Group(stand, [], [], 0.0)


def ats(seen: Seen) -> list[Group]:
    """ATS, arXiv 2111.15667, section 3: inverse transform sampling at fixed quantiles."""
    lengths = seen.v.transpose(0, 1).flatten(1).norm(dim=-1)
    score = [float(s) for s in seen.class_attention * lengths]
    free = [i for i in seen.free if seen.size[i] > 0]
    total = sum(score[i] for i in free)
    groups, samples = [alone(seen, i, "keep") for i in range(seen.protected)], []
    places = seen.left - seen.protected
    for k in range(1, places + 1):
        reached = 0.0
        for position in free:
            reached += score[position] / total
            if reached >= (2 * k - 1) / (2 * places):
                break
        new = position not in samples
        groups.append(alone(seen, position, "keep") if new else hole(position))
        samples.append(position)
    return groups


def threshold(tau: float) -> Rule:
    """Bipartite matching of the r best edges, and of those above tau."""

    def rule(seen: Seen) -> list[Group]:
        even = [i for i in seen.free if i % 2 == 0]
        odd = [i for i in seen.free if i % 2 == 1]
        cosines, used = seen.cosines, [bool(size > 0) for size in seen.size]
        partner, similarity = dict.fromkeys(even, odd[0]), dict.fromkeys(even, -math.inf)
        for i in even:
            for j in odd:
                if used[i] == used[j] and float(cosines[i, j]) > similarity[i]:
                    partner[i], similarity[i] = j, float(cosines[i, j])
        # What is out of use is lost first.
        lost = sorted(even, key=lambda i: (used[i], -similarity[i] if used[i] else 0.0, i))
        lost = lost[: seen.tokens - seen.left]
        merged = [i for i in even if i in lost or (used[i] and similarity[i] > tau)]
        groups = [alone(seen, i) for i in range(seen.protected)]
        for i in even:
            if i not in lost:
                groups.append(hole(i) if i in merged or not used[i] else alone(seen, i))
        for j in odd:
            groups.append(together(seen, j, [j, *(i for i in merged if partner[i] == j)]))
        return groups

    return rule


def avit(gamma: float, beta: float, epsilon: float = 0.01) -> Rule:
    """A-ViT, arXiv 2112.07658, section 3."""

    def rule(seen: Seen) -> list[Group]:
        running = [i for i in seen.free if seen.size[i] > 0]
        total = list(seen.memory.get("total", [0.0] * seen.tokens))
        for i in running:
            total[i] += 1 / (1 + math.exp(-(gamma * float(seen.hidden[i, 0]) + beta)))
        spared = min(running, key=lambda i: (total[i], i))
        on = [i for i in running if total[i] < 1 - epsilon or i == spared]
        order = sorted(on, key=lambda i: (total[i], i)) + [i for i in seen.free if i not in on]
        kept = sorted(order[: seen.left - seen.protected])
        stays = [*range(seen.protected), *kept]
        seen.memory["total"] = [total[i] for i in stays]
        halted = [i for i in kept if i not in on]
        return [hole(i) if i in halted else alone(seen, i, "keep") for i in stays]

    return rule


Weights = dict[int, dict[str, Tensor]]


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def draws(seen: Seen) -> Tensor:
    """The logistic variables of learned policies: quantiles an even step apart."""
    import random

    prime = seen.tokens + 1
    while any(prime % d == 0 for d in range(2, prime)):
        prime += 1
    drawn = random.Random(seen.index)
    drawn.randrange(1, prime)
    start, step = drawn.randrange(prime), round(prime * 0.6180339887)
    places = [(i * step + start) % prime for i in range(1, seen.tokens + 1)]
    shares = [(place + 0.5) / prime for place in places]
    return torch.tensor([math.log(share / (1 - share)) for share in shares]).double()


def keep_odds(seen: Seen, w: dict[str, Tensor]) -> Tensor:
    """DynamicViT's prediction module, eq. 1 to 5: the log-odds of keeping each token."""
    layer = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    gelu = lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2)))  # noqa: E731
    w = {name: tensor.double() for name, tensor in w.items()}
    features = gelu(layer(normalised(seen.hidden, w["norm.weight"], w["norm.bias"]), "embed"))
    half = features.shape[1] // 2
    shared = features[seen.free, half:].mean(0)
    rows = torch.stack([torch.cat([row[:half], shared]) for row in features])
    logits = layer(gelu(layer(gelu(layer(rows, "mix")), "narrow")), "out")
    chances = logits.softmax(-1)
    return (chances[:, 0] / chances[:, 1]).log()


def dynamicvit(weights: Weights) -> Rule:
    return prune(lambda seen: keep_odds(seen, weights[seen.index]) + draws(seen))


def adavit(weights: Weights) -> Rule:
    """A linear policy and a draw; of at most so many tokens those below 0 are out of use."""

    def rule(seen: Seen) -> list[Group]:
        w = {name: tensor.double() for name, tensor in weights[seen.index].items()}
        x = normalised(seen.hidden, w["norm.weight"], w["norm.bias"])
        used = [i for i in seen.free if seen.size[i] > 0]
        other = x[0] if seen.protected else x[used].mean(0)
        logit = (x * w["token.weight"]).sum(-1) + (other * w["class.weight"]).sum() + w["bias"]
        score = torch.full_like(logit, -math.inf)
        score[used] = (logit + draws(seen))[used]
        kept = best(score, seen.free, seen.left - seen.protected)
        stays = {i for i in kept if score[i] >= 0} | set(best(score, kept, 1))
        tokens = [alone(seen, i, "keep") for i in range(seen.protected)]
        return tokens + [
            alone(seen, i, "keep") if i in stays else Group(i, [], [], 0.0) for i in kept
        ]

    return rule
