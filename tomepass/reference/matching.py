"""Which tokens merge: counts, edges between sources and destinations, and the index map."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

_INF = float("inf")


def schedule(r: int | list[int] | tuple[int, float], blocks: int) -> list[int]:
    """Counts of tokens to merge, one a block (before the cap of `merge_count`).

    - `r: int`: the same in every block.
    - `r: list[int]`: a count a block, padded with zeros at the end.
    - `r: (count, inflection)`, inflection in [-1, 1]: from `lo = int(count * (1 - inflection))` to
      `hi = 2 * count - lo`, linear over the blocks, each truncated. A single block, on which no
      line is defined, gets the mean of both ends.
    """
    if isinstance(r, tuple):
        return _inflected(*r, blocks)
    counts = [r] * blocks if isinstance(r, int) else list(r)
    if len(counts) > blocks:
        raise ValueError(f"{len(counts)} counts for {blocks} blocks")
    if any(count < 0 for count in counts):
        raise ValueError(f"a count is negative: {counts}")
    return counts + [0] * (blocks - len(counts))


def _inflected(count: int, inflection: float, blocks: int) -> list[int]:
    if count < 0 or not -1 <= inflection <= 1:
        raise ValueError(f"need a count >= 0 and an inflection in [-1, 1]: {(count, inflection)}")
    lo = int(count * (1 - inflection))
    hi = 2 * count - lo
    steps = blocks - 1
    if steps == 0:
        return [count]
    # In integers: a rounded step would now and then truncate a whole number to the one below it.
    return [(lo * steps + (hi - lo) * block) // steps for block in range(blocks)]


def merge_count(r: int, tokens: int, protected: tuple[int, ...]) -> int:
    """How many of `tokens` a block that is asked to merge `r` does merge: at most half."""
    sources, destinations = _partition(tokens, protected)
    if r < 0:
        raise ValueError(f"a negative count: {r}")
    if not destinations:
        return 0
    return min(r, (tokens - len(set(protected))) // 2, len(sources))


@dataclass(frozen=True, eq=False)
class Edges:
    """How edges are drawn and ranked: ToMe's choices (arXiv 2210.09461, table 1) and weights.

    similarity: "cosine", "dot", "euclidean" (minus the squared distance), or "softmax" (over a
    source's destinations, of the product over √D); partition: "alternating" (even positions are
    sources), "sequential" (the first half are), or "random" (a half drawn with `seed`: the i-th
    free token, counted from 1, is ordered by `(i * step + start) % prime`, the prime the first
    above their number, step and start the first draws of `random.Random(seed)` below the prime,
    step not 0; the first half of that order are sources); importance: `[B, N]`, or None: the
    dissimilarity of an edge (1 - cosine, squared distance) is multiplied with its source's
    importance to the power `exponent` before edges are ranked.
    """

    similarity: str = "cosine"
    partition: str = "alternating"
    seed: int = 0
    importance: Tensor | None = None
    exponent: float = 0.3

    def halves(self, tokens: int, protected: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """The unprotected positions: sources, destinations."""
        even, odd = _partition(tokens, protected)
        if self.partition == "alternating":
            return even, odd
        free = sorted(even + odd)
        order = list(free)
        if self.partition == "random":
            prime = len(free) + 1
            while any(prime % d == 0 for d in range(2, prime)):
                prime += 1
            drawn = random.Random(self.seed)
            step, start = drawn.randrange(1, prime), drawn.randrange(prime)
            ranked = sorted(range(len(free)), key=lambda i: ((i + 1) * step + start) % prime)
            order = [free[i] for i in ranked]
        half = (len(free) + 1) // 2
        return sorted(order[:half]), sorted(order[half:])

    def costs(self, scores: list[list[float]], image: int, sources: list[int]) -> list[float]:
        """Of each source's best edge: the smaller, the sooner it merges."""
        best = [max(row) for row in scores]
        if self.importance is None:
            return [-score for score in best]
        nearest = 1.0 if self.similarity == "cosine" else 0.0
        own = self.importance[image].double()[sources].tolist()
        costs = [(nearest - b) * o**self.exponent for b, o in zip(best, own, strict=True)]
        return [_INF if math.isnan(cost) else cost for cost in costs]


_TOME = Edges()


def match(
    keys: Tensor,
    r: int,
    protected: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    padding: Tensor | None = None,
    edges: Edges = _TOME,
) -> Tensor:
    """Bipartite soft matching (arXiv 2210.09461, section 3).

    keys: `[B, H, N, D]`, the attention keys; r: tokens to merge, capped here by `merge_count`;
    protected: positions that neither merge nor are merged into; dtype: of the arithmetic;
    padding: `[B, N]` bool, tokens kept apart from the others, which merge before them as long as
    there is padding to merge with; edges: how they are ranked.
    Returns `[B, N]` int64: where each token goes in the merged sequence of `N - merge_count`
    tokens. That sequence holds the protected tokens, then the sources (even positions) that did
    not merge, then the destinations (odd positions), each in ascending position.
    A token ties with another in favour of the lower position, as a source and as a destination. A
    NaN score is the lowest of all. Where nothing merges the sequence stays as it was.
    """
    images, _, tokens, _ = keys.shape
    count = merge_count(r, tokens, protected)
    if count == 0:
        return torch.arange(tokens, device=keys.device).repeat(images, 1)
    sources, destinations = edges.halves(tokens, protected)
    assign = []
    for image, metric in enumerate(_metric(keys, dtype, edges)):
        hidden = [False] * tokens if padding is None else padding[image].tolist()
        scores = _scores(metric, sources, destinations, edges, hidden)
        best = [_argmax(row) for row in scores]
        costs = _padding_first(edges.costs(scores, image, sources), sources, destinations, hidden)
        merged = _by_cost(costs)[:count]
        drawn = {sources[row]: destinations[best[row]] for row in merged}
        assign.append(_places(tokens, protected, sources, destinations, drawn))
    return torch.tensor(assign, dtype=torch.int64, device=keys.device)


def match_margin(
    keys: Tensor,
    r: int,
    protected: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    edges: Edges = _TOME,
    padding: Tensor | None = None,
) -> Tensor:
    """How far each image is from another assignment, to tell a wrong match from a rounded tie.

    Arguments as for `match`. Returns `[B]` float64: the smallest of the gap between the last edge
    that merges and the first that does not, and, over the sources that merge, the gaps between
    their best and second best destination. Infinite where there is no choice to make. Scores that
    are both NaN leave no gap to round: the position decides between them.
    """
    images, _, tokens, _ = keys.shape
    margins = torch.full((images,), _INF, dtype=torch.float64, device=keys.device)
    count = merge_count(r, tokens, protected)
    if count == 0:
        return margins
    sources, destinations = edges.halves(tokens, protected)
    for image, metric in enumerate(_metric(keys, dtype, edges)):
        hidden = [False] * tokens if padding is None else padding[image].tolist()
        scores = _scores(metric, sources, destinations, edges, hidden)
        costs = _padding_first(edges.costs(scores, image, sources), sources, destinations, hidden)
        order = _by_cost(costs)
        gaps = [_gap_of_best_two(scores[row]) for row in order[:count]]
        if count < len(order):
            gaps.append(_gap(-costs[order[count - 1]], -costs[order[count]]))
        margins[image] = min(gaps)
    return margins


def kept(assign: Tensor, protected: tuple[int, ...], n_out: int, edges: Edges = _TOME) -> Tensor:
    """Which position each merged token stands for: its own, or of several the destination's.

    assign: `[B, N]` of `match`. Returns `[B, n_out]`.
    """
    images, tokens = assign.shape
    _, destinations = edges.halves(tokens, protected)
    found = torch.full((images, n_out), -1, dtype=torch.int64)
    for image, places in enumerate(assign.tolist()):
        for position, place in enumerate(places):
            if found[image, place] < 0 or position in destinations:
                found[image, place] = position
    return found.to(assign.device)


def _partition(tokens: int, protected: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The unprotected positions of set A (even: sources) and of set B (odd: destinations)."""
    if any(not 0 <= position < tokens for position in protected):
        raise ValueError(f"protected positions {protected} are not all in 0 .. {tokens - 1}")
    free = [position for position in range(tokens) if position not in protected]
    return [p for p in free if p % 2 == 0], [p for p in free if p % 2 == 1]


def _metric(keys: Tensor, dtype: torch.dtype, edges: Edges) -> Tensor:
    """`[B, H, N, D]` -> `[B, N, D]`: mean over heads, for cosines of unit length. No gradient."""
    mean = keys.detach().to(dtype).mean(dim=1)
    if edges.similarity != "cosine":
        return mean
    length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    unit: Tensor = mean / length.clamp(min=1e-12)
    return unit


def _scores(
    metric: Tensor,
    sources: list[int],
    destinations: list[int],
    edges: Edges,
    hidden: list[bool] | None = None,
) -> list[list[float]]:
    """Similarities in one image, `metric [N, D]`: a row a source, a column a destination.

    Where one of a pair is `hidden` and the other is not, none: not even a share of a softmax.
    """
    rows = []
    for source in sources:
        # A product and a sum, not a matmul, whose rounding may depend on the column: the same
        # vector at two destinations must give the same score.
        row = (metric[destinations] * metric[source]).sum(-1)
        if edges.similarity == "euclidean":
            row = -(metric[destinations] - metric[source]).square().sum(-1)
        apart = torch.zeros_like(row, dtype=torch.bool)
        if hidden is not None:
            others = [hidden[destination] != hidden[source] for destination in destinations]
            apart = torch.tensor(others, device=row.device)
        if edges.similarity == "softmax":
            row = (row / math.sqrt(metric.shape[-1])).masked_fill(apart, -_INF).softmax(-1)
        rows.append(row.masked_fill(row.isnan() | apart, -_INF).tolist())
    return rows


def _argmax(row: list[float]) -> int:
    # max() returns the first of equals; the order of equals in torch.argmax is not defined.
    return max(range(len(row)), key=row.__getitem__)


def _by_cost(costs: list[float]) -> list[int]:
    """The rows in the order in which they merge: the cheapest first, of equals the lower first."""
    return sorted(range(len(costs)), key=lambda row: (costs[row], row))


def _places(
    tokens: int,
    protected: tuple[int, ...],
    sources: list[int],
    destinations: list[int],
    drawn: dict[int, int],
) -> list[int]:
    """The place of every token, where `drawn` maps a source that merges to its destination."""
    kept = [source for source in sources if source not in drawn]
    order = sorted(set(protected)) + kept + destinations
    place = {position: index for index, position in enumerate(order)}
    return [place[drawn.get(position, position)] for position in range(tokens)]


def _padding_first(
    costs: list[float], sources: list[int], destinations: list[int], hidden: list[bool]
) -> list[float]:
    """The costs, nothing for what is hidden while there is some of it to merge with."""
    if not any(hidden[destination] for destination in destinations):
        return costs
    return [-_INF if hidden[s] else cost for s, cost in zip(sources, costs, strict=True)]


def _gap_of_best_two(row: list[float]) -> float:
    best, *rest = sorted(row, reverse=True)
    return _gap(best, rest[0]) if rest else _INF


def _gap(high: float, low: float) -> float:
    return _INF if low == -_INF or high == _INF else high - low
