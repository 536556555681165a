"""tome::unmerge and the source map behind it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tomepass import reference
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge
from tomepass.ops.merging.unmerge import compose, narrow_source, unmerge


def merged_in_steps(
    x: Tensor, counts: tuple[int, ...], protected: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """``x`` after a merge a count, by random keys, and the source map."""
    source, held = None, protected
    for r in counts:
        tokens = x.shape[1]
        assign = match(torch.randn(x.shape[0], 1, tokens, 4), r, list(held))
        source, x = compose(source, assign), merge(x, None, assign, tokens - r)
        held = tuple(range(len(protected)))
    assert source is not None
    return x, source


@settings(deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 12), st.integers(1, 30), st.integers(1, 4), st.integers(0, 99)
)
def test_unmerge_equals_the_reference(
    images: int, left: int, tokens: int, channels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, source = torch.randn(images, left, channels), torch.randint(0, left, (images, tokens))
    expected = reference.unmerge(x, source)
    assert torch.equal(unmerge(x, source, 1), expected)
    # The same along other dimensions, with others around it.
    assert torch.equal(unmerge(x.transpose(1, 2), source, 2), expected.transpose(1, 2))
    four = torch.stack([x, -x], dim=1)
    assert torch.equal(unmerge(four, source, 2), torch.stack([expected, -expected], dim=1))
    assert torch.equal(unmerge(x.unsqueeze(1).transpose(2, 3), source, 3)[:, 0].mT, expected)


def test_every_original_token_gets_the_value_of_the_one_that_holds_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 21, 5)
    merged, source = merged_in_steps(x, (6, 4, 3), (0,))
    full = unmerge(merged, source, 1)
    assert full.shape == x.shape
    for image in range(2):
        for place in range(8):
            members = (source[image] == place).nonzero().flatten()
            assert len(members) > 0
            assert bool((full[image, members] == merged[image, place]).all())
    assert torch.equal(full[:, 0], x[:, 0])  # protected


def test_compose_follows_every_merge() -> None:
    first, second = torch.tensor([[0, 1, 2, 2, 1]]), torch.tensor([[1, 0, 1]])
    assert torch.equal(compose(None, first), first)
    source = compose(first, second)
    assert source.tolist() == [[1, 0, 1, 1, 0]]
    assert torch.equal(source, reference.compose(second, first))


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_compose_equals_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, 9, (3, 17), generator=generator)
    assign = torch.randint(0, 5, (3, 9), generator=generator)
    assert torch.equal(compose(source, assign), reference.compose(assign, source))


@pytest.mark.parametrize(
    ("protected", "removed"),
    [
        ((0,), (0,)),
        ((0, 1, 2), (1,)),
        ((0, 1, 2), (0, 2)),
        ((3, 20), (20,)),
        ((3, 20), ()),
        ((), ()),
    ],
)
def test_a_narrowed_source_unmerges_a_sequence_without_some_protected_tokens(
    protected: tuple[int, ...], removed: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 21, 3)
    merged, source = merged_in_steps(x, (4, 3), protected)
    gone = [protected.index(p) for p in removed]
    positions = [p for p in range(21) if p not in removed]
    kept = merged[:, [i for i in range(merged.shape[1]) if i not in gone]]
    narrowed = narrow_source(source, positions, gone)
    assert narrowed.shape == (2, len(positions))
    assert narrowed.dtype is torch.int64
    assert torch.equal(unmerge(kept, narrowed, 1), unmerge(merged, source, 1)[:, positions])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_values_are_moved_never_rounded(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 5, 3) * 100).to(dtype)
    source = torch.randint(0, 5, (2, 9))
    full = unmerge(x, source, 1)
    assert full.dtype is dtype
    assert torch.equal(full, reference.unmerge(x, source))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unmerge(x, source, 1), full)


def test_strides_do_not_matter() -> None:
    x, source = torch.randn(3, 5, 4), torch.randint(0, 5, (3, 9))
    expected = unmerge(x, source, 1)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.stack([source, source], dim=-1)[..., 1]
    assert torch.equal(unmerge(turned, wide, 1), expected)
    assert torch.equal(unmerge(x[:1].expand(3, -1, -1), source, 1)[0], expected[0])


def test_gradients_add_up_over_the_positions_a_token_holds() -> None:
    x = torch.zeros(1, 3, 1, requires_grad=True)
    unmerge(x, torch.tensor([[0, 1, 1, 2, 1]]), 1).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize("dim", [1, 2])
def test_gradients_are_right(dim: int) -> None:
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    source = torch.randint(0, 4, (2, 7))
    assert torch.autograd.gradcheck(lambda v: unmerge(v, source, dim), (x,))


def test_what_was_dropped_stays_dropped() -> None:
    dropped = torch.tensor([[0, -1, 1, 2], [-1, 0, -1, 1]])
    then = torch.tensor([[0, -1, 1], [1, 0, 1]])
    expected = [[0, -1, -1, 1], [-1, 1, -1, 0]]
    assert torch.ops.tome.compose_held(dropped, then).tolist() == expected
    assert torch.equal(torch.ops.tome.compose_held(None, then), then)
