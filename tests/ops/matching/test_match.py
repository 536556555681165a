"""tome::match against the plain reference.

A cosine of float32 keys is rounded, and rounding may break a tie either way. Where index maps
must be equal, ties included, keys are rows of signs with 1, 4 or 16 entries: their lengths are
powers of two, so all arithmetic on them is exact, in any order and in any dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from depth import in_turn
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor

from tomepass import reference
from tomepass.ops.matching.match import match

# Of two float32 cosines, in either order of summation.
ROUNDING = 1e-5


class Case(NamedTuple):
    keys: Tensor
    r: int
    protected: tuple[int, ...]


def exact_keys(images: int, heads: int, tokens: int, width: int, kinds: int, seed: int) -> Tensor:
    """``[B, H, N, D]`` of at most ``kinds`` different mean rows; the heads differ, exactly."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 2, (images, kinds, width), generator=generator) * 2.0 - 1
    drawn = torch.randint(0, kinds, (images, tokens), generator=generator)
    mean = torch.stack([r[d] for r, d in zip(rows, drawn, strict=True)])
    if heads == 1:
        return mean[:, None]
    pairs = torch.randint(-3, 4, (images, heads // 2, tokens, width), generator=generator)
    return torch.cat([mean[:, None] + pairs, mean[:, None] - pairs], dim=1)


@st.composite
def exact_cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.integers(1, 34), label="tokens")
    protected = draw(
        st.lists(st.integers(0, tokens - 1), max_size=5, unique=True).map(sorted).map(tuple),
        label="protected",
    )
    cap = reference.merge_count(tokens, tokens, protected)
    r = draw(st.sampled_from(sorted({0, min(1, cap), cap // 2, cap})), label="r")
    keys = exact_keys(
        images=draw(st.integers(1, 3), label="images"),
        heads=draw(st.sampled_from([1, 2, 4]), label="heads"),
        tokens=tokens,
        width=draw(st.sampled_from([1, 4, 16]), label="width"),
        kinds=draw(st.integers(1, 12), label="kinds"),
        seed=draw(st.integers(0, 2**30), label="seed"),
    )
    return Case(keys, r, protected)


def check_against_reference(case: Case) -> None:
    keys, r, protected = case
    assign = match(keys, r, list(protected))
    assert assign.dtype is torch.int64
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(assign, reference.match(keys, r, protected, dtype))


def clear_images(keys: Tensor, r: int, protected: tuple[int, ...]) -> Tensor:
    """Which images no rounding of a float32 cosine can match differently."""
    return reference.match_margin(keys, r, protected) > ROUNDING


@given(exact_cases())
@examples(100)
def test_index_maps_equal_the_reference_ties_included(case: Case) -> None:
    check_against_reference(case)


@pytest.mark.parametrize(
    ("protected", "r", "tokens"),
    in_turn(
        [(), (0,), (0, 1, 2, 3, 4), (40,), (39, 40), (3, 7, 20), (1,)], [0, 1, 11, 18], [41, 42]
    ),
)
def test_random_keys_match_the_reference(protected: tuple[int, ...], r: int, tokens: int) -> None:
    torch.manual_seed(tokens + r)
    keys = torch.randn(8, 3, tokens, 12)
    r = reference.merge_count(r, tokens, protected)
    clear = clear_images(keys, r, protected)
    assert int(clear.sum()) >= 6
    assign = match(keys, r, list(protected))
    assert torch.equal(assign[clear], reference.match(keys, r, protected)[clear])


def test_a_whole_sequence_of_equal_tokens_merges_from_the_front() -> None:
    # Every edge is a tie: the first sources merge, all into the first destination.
    keys = torch.ones(2, 2, 11, 4)
    assign = match(keys, 3, [0])
    # 0 | 8 10 | 1 (2 4 6) 3 5 7 9
    assert assign.tolist() == [[0, 3, 3, 4, 3, 5, 3, 6, 1, 7, 2]] * 2


def test_position_of_the_protected_does_not_matter_given_in_any_order() -> None:
    keys = exact_keys(2, 2, 12, 16, kinds=8, seed=3)
    expected = match(keys, 3, [2, 7])
    assert torch.equal(match(keys, 3, [7, 2]), expected)
    assert torch.equal(match(keys, 3, [7, 2, 7]), expected)
    check_against_reference(Case(keys, 3, (2, 7)))


@pytest.mark.parametrize(("tokens", "protected"), [(1, []), (5, [1, 3]), (6, [0, 2, 4]), (4, [0])])
def test_nothing_to_merge_leaves_the_order_as_it_was(tokens: int, protected: list[int]) -> None:
    keys = torch.randn(3, 2, tokens, 4)
    assert match(keys, 0, protected).tolist() == [list(range(tokens))] * 3


@pytest.mark.parametrize(
    ("r", "tokens", "protected", "most"),
    [(4, 6, [], 3), (3, 7, [0], 3), (-1, 6, [], 0), (1, 5, [1, 3], 0), (99, 197, [0], 98)],
)
def test_an_r_beyond_the_cap_is_refused(
    r: int, tokens: int, protected: list[int], most: int
) -> None:
    keys = torch.randn(1, 1, tokens, 4)
    if r == most:
        assert match(keys, r, protected).shape == (1, tokens)
        return
    with pytest.raises(ValueError, match=rf"{most} of {tokens} tokens .* got r={r}"):
        match(keys, r, protected)


# Keys that are no numbers


@given(exact_cases(), st.data())
@examples(60)
def test_nan_keys_rank_last_and_break_nothing(case: Case, data: st.DataObject) -> None:
    tokens = case.keys.shape[2]
    for position in data.draw(st.sets(st.integers(0, tokens - 1), max_size=tokens), label="nan"):
        case.keys[0, -1, position] = math.nan
    check_against_reference(case)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 0.0])
@pytest.mark.parametrize("protected", [[], [0], [10]])
def test_any_key_gives_valid_indices(bad: float, protected: list[int]) -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 3, 11, 8)
    keys[0] = bad
    keys[1, :, 4] = bad
    assign = match(keys, 4, protected)
    for places in assign.tolist():
        assert sorted(set(places)) == list(range(7))
        assert [places[p] for p in protected] == list(range(len(protected)))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_matches_as_its_values_do_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    keys = torch.randn(8, 3, 41, 16).to(dtype)
    clear = clear_images(keys, 9, (0,))
    assert int(clear.sum()) >= 6
    assign = match(keys, 9, [0])
    assert torch.equal(assign[clear], reference.match(keys, 9, (0,))[clear])
    exact = exact_keys(4, 2, 24, 16, kinds=5, seed=1)
    assert torch.equal(match(exact.to(dtype), 7, [0]), reference.match(exact, 7, (0,)))


def nearly_alike(difference: float) -> Tensor:
    """Keys around one direction, in float64."""
    torch.manual_seed(2)
    keys = torch.randn(4, 1, 1, 16, dtype=torch.float64)
    return keys + difference * torch.randn(4, 1, 20, 16, dtype=torch.float64)


def test_float64_keys_are_matched_in_float64() -> None:
    keys = nearly_alike(1e-5)  # cosines 1e-10 apart
    expected = reference.match(keys, 6, ())
    assert torch.equal(match(keys, 6, []), expected)
    assert not torch.equal(match(keys.float(), 6, []), expected)  # or this test shows nothing


def test_autocast_does_not_reach_the_metric() -> None:
    keys = nearly_alike(1e-2).float()  # cosines 1e-4 apart
    expected = match(keys, 6, [])
    assert not torch.equal(match(keys.bfloat16(), 6, []), expected)  # or this test shows nothing
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(keys, 6, []), expected)


# Layout and neighbours


def test_strides_do_not_matter() -> None:
    keys = exact_keys(3, 4, 26, 16, kinds=7, seed=4)
    expected = match(keys, 8, [0])
    as_attention_has_them = keys.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([keys, keys + 1], dim=-1)[..., 0]
    for same in (as_attention_has_them, strided, keys.flip(0).flip(0)):
        assert torch.equal(match(same, 8, [0]), expected)
    assert not as_attention_has_them.is_contiguous()
    assert not strided.is_contiguous()
    assert torch.equal(match(keys[:1].expand(3, -1, -1, -1), 8, [0]), expected[:1].expand(3, -1))


def test_an_image_does_not_see_its_neighbours() -> None:
    torch.manual_seed(5)
    keys = torch.randn(4, 3, 50, 32)
    assign = match(keys, 12, [0])
    assert torch.equal(match(keys, 12, [0]), assign)
    others = keys.clone()
    others[1:] = 100 * torch.randn(3, 3, 50, 32)
    others[3] = math.nan
    assert torch.equal(match(others, 12, [0])[0], assign[0])
    assert torch.equal(match(keys.flip(0), 12, [0]), assign.flip(0))
    clear = clear_images(keys, 12, (0,))
    assert bool(clear.any())
    alone = torch.cat([match(keys[i : i + 1], 12, [0]) for i in range(4)])
    assert torch.equal(alone[clear], assign[clear])


def test_no_gradient_flows_through_a_matching() -> None:
    keys = torch.randn(2, 2, 10, 4, requires_grad=True)
    assign = match(keys, 3, [0])
    assert not assign.requires_grad
    with torch.enable_grad():
        assert match(keys * 2, 3, [0]).grad_fn is None
