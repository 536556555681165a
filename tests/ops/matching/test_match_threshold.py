"""tome::match_threshold against loops over tokens, and merges into places out of use."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor, nn

from tomepass import reference
from tomepass.ops.matching.match import match
from tomepass.ops.matching.match_threshold import match_threshold
from tomepass.ops.merging.combine import mlerp
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import merge_bias, merge_rows
from tomepass.ops.padding import PADDED


def keys(images: int, tokens: int, seed: int = 0) -> Tensor:
    """``[B, 2, N, D]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 2, tokens, 4, generator=generator, dtype=torch.float64)


def plain(
    metric: Tensor, r: int, protected: list[int], kind: list[int], tau: float
) -> tuple[list[int], list[int]]:
    """Of one image: where each token goes and what stands there. Kinds: 2 a token, 1 padding, 0
    out of use."""
    directions = metric / metric.norm(dim=-1, keepdim=True)
    cosines = (directions @ directions.T).tolist()
    tokens = len(kind)
    even = [i for i in range(0, tokens, 2) if i not in protected]
    odd = [i for i in range(1, tokens, 2) if i not in protected]
    edges: dict[int, tuple[float, int]] = {}
    for i in even:
        alike = [j for j in odd if kind[j] == kind[i]]
        partner = max(alike, key=lambda j: (cosines[i][j], -j)) if alike else odd[0]
        edges[i] = (cosines[i][partner] if alike else -float("inf"), partner)
    order = sorted(even, key=lambda i: (-float("inf") if kind[i] < 2 else -edges[i][0], i))
    lost = order[:r]
    merged = [i for i in even if i in lost or (kind[i] == 2 and edges[i][0] > tau)]
    stands = [*protected, *(i for i in even if i not in lost), *odd]
    goes = [stands.index(edges[i][1] if i in merged else i) for i in range(tokens)]
    return goes, stands


@examples(60)
@given(st.data())
def test_maps_are_those_of_plain_loops(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 24), label="tokens")
    protected = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=4), label="held"))
    cap = reference.merge_count(tokens, tokens, tuple(protected))
    if not cap:
        return
    r = data.draw(st.integers(1, cap), label="r")
    tau = data.draw(st.sampled_from([-1.0, 0.0, 0.4, 0.8, 1.0]), label="tau")
    features = keys(2, tokens, data.draw(st.integers(0, 2**30), label="seed"))
    kinds, size = [[2] * tokens] * 2, None
    if data.draw(st.booleans(), label="sized"):
        one = st.lists(st.sampled_from([2, 2, 1, 0]), min_size=tokens, max_size=tokens)
        kinds = [data.draw(one, label="kinds") for _ in range(2)]
        size = torch.tensor([0.0, PADDED * 1e-3, 3.0])[torch.tensor(kinds)]
    goes, stands = match_threshold(features, r, protected, size, tau)
    for image in range(2):
        expected = plain(features[image].mean(0), r, protected, kinds[image], tau)
        assert (goes[image].tolist(), stands[image].tolist()) == expected


@pytest.mark.parametrize("r", [1, 4, 9])
def test_without_edges_above_it_it_is_the_plain_match(r: int) -> None:
    features = keys(3, 20, r)
    assert torch.equal(match_threshold(features, r, [0], None, 1.0)[0], match(features, r, [0]))


def test_the_number_merged_is_that_above_the_threshold() -> None:
    features = keys(6, 40)
    left = []
    for tau in (0.5, 0.7, 0.9, 0.99):
        goes, _ = match_threshold(features, 2, [0], None, tau)
        size = merge_size(None, goes, 38)
        assert torch.equal(size.sum(1), torch.full((6,), 40.0))
        left.append((size > 0).sum(1))
    assert all((a <= b).all() for a, b in itertools.pairwise(left))
    assert len(set(left[1].tolist())) > 1
    assert (left[-1] >= 36).all()


def test_more_than_can_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="2 of 5 tokens can merge, 1 protected: got r=3"):
        match_threshold(keys(1, 5), 3, [0], None, 0.9)


def test_a_token_without_a_direction_merges_last() -> None:
    features = keys(1, 12)
    features[:, :, 4] = float("nan")
    goes, stands = match_threshold(features, 4, [0], None, -1.0)
    assert int(stands[0, int(goes[0, 4])]) == 4


# ---- what merges leave -----------------------------------------------------------------------


def test_a_place_out_of_use_gives_nothing_to_what_it_is_merged_with() -> None:
    x = torch.randn(1, 4, 5)
    assign, size = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    for merged in (merge(x, size, assign, 4), mlerp(x, size, assign, 4, "max")):
        torch.testing.assert_close(merged[0, :2], x[0, [0, 2]])
        assert merged[0, 2:].tolist() == [[0.0] * 5] * 2  # nothing of any size, and nothing at all
    assert merge_size(size, assign, 4).tolist() == [[1.0, 2.0, 0.0, 0.0]]
    other = x.clone()
    other[0, 1] *= 100  # a longer one of size 0 sets no norm
    ours, theirs = (mlerp(each, size, assign, 4, "max") for each in (other, x))
    torch.testing.assert_close(ours, theirs)
    assert mlerp(x, size, assign, 4, "mean").isfinite().all()


def test_a_bias_to_and_from_a_place_out_of_use_is_nothing() -> None:
    bias = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    source = torch.tensor([[0, 1, 1, 3, 4, 3], [0, 1, 2, 3, -1, 1]])
    merged = merge_bias(bias, source, 5)
    for image, empty in enumerate((2, 4)):
        assert merged[image, :, empty].abs().max() == 0
        assert merged[image, :, :, empty].abs().max() == 0
    # The others are what they are without it.
    alone = merge_bias(bias, torch.tensor([[0, 1, 1, 2, 3, 2]]), 4)
    torch.testing.assert_close(merged[0][:, [0, 1, 3, 4]][:, :, [0, 1, 3, 4]], alone[0])
    merged.sum().backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all()
    assert merge_rows(torch.randn(6, 3), source, 5)[0, 2].tolist() == [0.0] * 3


# ---- doors -----------------------------------------------------------------------------------


class Merging(nn.Module):
    """Two blocks: the second finds places out of use."""

    def forward(self, heads: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        goes, stands = match_threshold(heads, 2, [0], None, 0.3)
        x, size = merge(x, None, goes, 10), merge_size(None, goes, 10)
        again, _ = match_threshold(x.unsqueeze(1), 3, [0], size, 0.3)
        return merge(x, size, again, 7), merge_size(size, again, 7), stands


# tests/methods/test_generated_code.py has code generated of them.
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)]
)
def test_they_vanish_in_an_exported_program_and_compile(compiler: str) -> None:
    heads, x = torch.randn(2, 3, 12, 4), torch.randn(2, 12, 5)
    program = torch.export.export(Merging(), (heads, x)).run_decompositions()
    assert not [n for n in program.graph.nodes if str(n.target).startswith("tome.")]
    expected = Merging()(heads, x)
    assert int((expected[1] == 0).sum()) > 0
    compiled = torch.compile(Merging(), fullgraph=True, backend=compiler)
    for other in (program.module(), compiled):
        for got, wanted in zip(other(heads, x), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_opcheck() -> None:
    heads = torch.randn(2, 3, 12, 4)
    torch.library.opcheck(match_threshold, (heads, 3, [0], None, 0.5))
    torch.library.opcheck(match_threshold, (heads, 3, [0], torch.ones(2, 12), 0.5))
