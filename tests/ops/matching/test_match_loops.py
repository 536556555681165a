"""Greedy pairs, clusters and chosen sets against plain loops over one image at a time."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor

from tomepass.ops.matching.match_greedy import match_greedy
from tomepass.ops.matching.match_kmeans import match_kmeans
from tomepass.ops.matching.match_sets import match_sets


def features(data: st.DataObject, tokens: int) -> Tensor:
    """``[2, 2, N, 3]`` float64: no two cosines tie."""
    seed = data.draw(st.integers(0, 2**30), label="seed")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, tokens, 3, generator=generator, dtype=torch.float64)


def alike(a: Tensor, b: Tensor, similarity: str) -> float:
    if similarity == "cosine":
        return float(torch.cosine_similarity(a, b, dim=0))
    return -float((a - b).square().sum())


def in_sequence(into: list[int], protected: list[int]) -> tuple[list[int], list[int]]:
    """Protected tokens, then those that stay: each token's place, and who stands at each."""
    stands = protected + [i for i, to in enumerate(into) if to == i and i not in protected]
    return [stands.index(to) for to in into], stands


SIMILARITIES = st.sampled_from(["cosine", "euclidean"])


@examples(40)
@given(st.data())
def test_greedy_pairs(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(4, 10), label="tokens")
    protected = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=2)))
    r = data.draw(st.integers(1, 2), label="r")
    x, similarity = features(data, tokens), data.draw(SIMILARITIES)
    free = [i for i in range(tokens) if i not in protected]
    if 2 * r > len(free) or r > sum(i % 2 == 0 for i in free):
        return
    assign, stands = match_greedy(x, r, protected, None, similarity)
    for image in range(2):
        metric, left, into = x[image].mean(0), set(free), list(range(tokens))
        for _ in range(r):
            pairs = [(i, j) for i in left for j in left if i < j]
            low, high = max(pairs, key=lambda p: alike(metric[p[0]], metric[p[1]], similarity))
            into[high] = low
            left -= {low, high}
        expected = in_sequence(into, protected)
        assert (assign[image].tolist(), stands[image].tolist()) == expected


@examples(30)
@given(st.data())
def test_clusters(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(8, 16), label="tokens")
    protected = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=2)))
    free = [i for i in range(tokens) if i not in protected]
    r = data.draw(st.integers(2, len(free) - 2), label="r")
    x, similarity = features(data, tokens), data.draw(SIMILARITIES)
    for iterations in (1, 2, 3, 5):
        found = match_kmeans(x, r, protected, None, similarity, iterations)
        for image, (assign, stands) in enumerate(zip(*found, strict=True)):
            into = clustered(x[image].mean(0), free, len(free) - r, similarity, iterations)
            assert (assign.tolist(), stands.tolist()) == in_sequence(into, protected)


def clustered(
    metric: Tensor, free: list[int], clusters: int, similarity: str, iterations: int
) -> list[int]:
    """Where each token goes: to a seed, its own place if it takes no part."""
    if similarity == "cosine":
        metric = torch.nn.functional.normalize(metric, dim=-1)
    seeds = [free[i * len(free) // clusters] for i in range(clusters)]
    centres, into = [metric[s] for s in seeds], list(range(len(metric)))
    for _ in range(iterations):
        for i in set(free) - set(seeds):
            near = [alike(metric[i], centre, similarity) for centre in centres]
            into[i] = seeds[near.index(max(near))]
        centres = [metric[[i for i in free if into[i] == s]].mean(0) for s in seeds]
    return into


@examples(40)
@given(st.data())
def test_sets_of_each_image(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(4, 12), label="tokens")
    protected = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=1)))
    free = [i for i in range(tokens) if i not in protected]
    count = data.draw(st.integers(1, len(free) - 1), label="sources")
    r = data.draw(st.integers(0, count), label="r")
    x, similarity = features(data, tokens), data.draw(SIMILARITIES)
    orders = [data.draw(st.permutations(free)) for _ in range(2)]
    sources, destinations = (
        torch.tensor([order[part] for order in orders])
        for part in (slice(count), slice(count, None))
    )
    assign, stands = match_sets(x, sources, destinations, r, protected, None, similarity)
    for image, order in enumerate(orders):
        metric, into = x[image].mean(0), list(range(tokens))
        edges = []
        for source in order[:count]:
            near = {d: alike(metric[source], metric[d], similarity) for d in order[count:]}
            best = max(near, key=lambda d: near[d])
            edges.append((near[best], source, best))
        for _, source, best in sorted(edges, key=lambda edge: -edge[0])[:r]:
            into[source] = best
        expected = in_sequence(into, protected)
        assert (assign[image].tolist(), stands[image].tolist()) == expected
