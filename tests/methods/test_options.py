"""Options that make no sense, alone or together, are refused in words that name them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tomepass import ATS, MLERP, DiffRate, EViT, Method, PiToMe, Prune, SPViT, ToFu, ToMe
from tomepass.calibration.shapes import Shape
from tomepass.methods import method_from_dict

BENT = (0.5, 0.1, 0.4, 0.2)


def planned(method: Method, tokens: int = 65, depth: int = 2) -> list[int]:
    return [block.r for block in method.plan(tokens, (0,), depth).blocks]


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: EViT(prop_attn=True, fuse=False), ("prop_attn=True", "fuse=False")),
        (lambda: Prune(4, seed=1), ("seed=1", "score='class_attention'")),
        (lambda: Prune(4, prop_attn=True), ("prop_attn=True", "Prune")),
        (lambda: ATS(4, prop_attn=True), ("prop_attn=True", "ATS")),
        (lambda: Prune(4, score="keys"), ("score", "'keys'")),  # type: ignore[arg-type]
        (lambda: SPViT(score="keys"), ("score", "'keys'")),  # type: ignore[arg-type]
        (lambda: PiToMe(4, margin=1.5), ("margin", "1.5")),
        (lambda: DiffRate(4, pruned=1.5), ("pruned", "1.5")),
        (lambda: DiffRate(4, pruned=(0.5, 1.5)), ("pruned", "1.5")),
        (lambda: DiffRate(4, pruned=(-1, 2)), ("pruned", "-1")),
        (lambda: ToMe([8, 4, 0], blocks=(1,)), ("r=[8, 4, 0]", "blocks=(1,)")),
        (lambda: planned(DiffRate(4, pruned=(1, 2, 3))), ("pruned=(1, 2, 3)", "has 2")),
        (lambda: planned(DiffRate(4, pruned=(0.5,))), ("pruned=(0.5,)", "has 2")),
        (lambda: planned(DiffRate([4, 2], pruned=(4, 3))), ("pruned=(4, 3)", "r=[4, 2]")),
        (lambda: planned(DiffRate([4], pruned=(4, 1))), ("pruned=(4, 1)", "r=[4]")),
        (lambda: planned(DiffRate(4, pruned=(4, 1), blocks=(0,))), ("pruned=(4, 1)", "r=4")),
        (lambda: DiffRate(macs=0.7, pruned=(4, 1)), ("pruned=(4, 1)", "macs=0.7")),
        (lambda: DiffRate(keep_rate=0.7, pruned=(4, 1)), ("pruned=(4, 1)", "keep_rate=0.7")),
        (lambda: DiffRate(4, pruned=(4, 1), adaptive=True), ("pruned=(4, 1)", "adaptive")),
        (lambda: DiffRate(4, pruned=(4, 1)).measured(BENT), ("pruned=(4, 1)", "calibration")),
        (
            lambda: ToFu(4, mlerp=MLERP("mean"), strategies=("prune", "prune")),
            ("mlerp=MLERP(norm='mean')", "strategies=('prune', 'prune')"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    made: Callable[[], Any], named: tuple[str, str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(named[0])) as caught:
        made()
    assert named[1] in str(caught.value)


def test_mlerp_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mlerp must be MLERP.*'max'"):
        ToFu(4, mlerp="max")  # type: ignore[arg-type]


def test_what_makes_sense_is_not_refused() -> None:
    assert planned(ToMe([0, 4, 0], blocks=(1,)), depth=3) == [0, 4, 0]
    # Where all is switched off, and where an image is too small for what was asked.
    assert planned(DiffRate(0, pruned=(4, 3))) == [0, 0]
    small = DiffRate(8, pruned=(8, 8))
    assert planned(small, tokens=12) == [8, 2]
    assert small.pruned_in(1, 2) == 2


def test_shapes_leave_out_the_blocks_that_are_left_out() -> None:
    method = ToMe(blocks=(1, 2))
    counts = Shape().counts(0.2, method, 65, 1, 4)
    assert [bool(count) for count in counts] == [False, True, True, False]
    assert method.replace(r=counts).counts(4) == tuple(counts)
    assert Shape(last="most").counts(0.2, method, 65, 1, 4)[3] == 0


def test_a_count_of_one_is_not_a_share_of_one() -> None:
    count, share = DiffRate(8, pruned=(1, 0)), DiffRate(8, pruned=(1.0, 0.0))
    assert [m.pruned_in(0, 8) for m in (count, share)] == [1, 8]
    assert len({count, share, DiffRate(8, pruned=(1, 0))}) == 2
    for method in (count, share):
        assert method_from_dict(method.to_dict()) == method
        assert method.pruned_in(1, 8) == 0


def test_diffrate_s_variants_search_each_block_by_depth_and_by_linearity() -> None:
    start = DiffRate(8)
    found = [variant.pruned for variant in start.variants(BENT)]
    assert {0.0, 0.25, 0.5, 0.75} <= set(found)
    assert (0.0, 0.33, 0.67, 1.0) in found
    # The least linear block first, which is block 0, then 2, 3 and 1; and the other way round.
    assert (0.0, 1.0, 0.33, 0.67) in found
    assert found[7] == pytest.approx((1.0, 0.0, 0.67, 0.33))
    # From where a search stands, each block of four up and down by itself.
    best = start.replace(pruned=(0.5, 0.5, 0.75, 1.0))
    moved = {variant.pruned for variant in best.variants(BENT)}
    assert {(0.25, 0.5, 0.75, 1.0), (0.5, 0.75, 0.75, 1.0), (0.5, 0.5, 0.75, 0.75)} <= moved
    for variant in best.variants(BENT):
        assert variant.replace(r=[8, 0, 3, 1]).plan(65, (0,), 4)  # whatever the counts are
        assert 0 <= variant.pruned_in(0, 8) <= 8
    # At an end there is one way to go, and fewer than four blocks are moved one by one.
    ends = [v.pruned for v in start.replace(pruned=(0.0, 1.0, 0.0)).variants(BENT[:3])]
    assert ends[-3:] == [(0.25, 1.0, 0.0), (0.0, 0.75, 0.0), (0.0, 1.0, 0.25)]
    assert len(ends) == 11


def test_tofu_s_fallback_is_named_and_gone_once_measured() -> None:
    assert repr(ToFu(16)) == "ToFu(r=16, strategies='halves')"
    assert repr(ToFu(16, trace_source=True)).endswith("trace_source=True, strategies='halves')")
    measured = ToFu(16).measured(BENT)
    assert measured.strategies == ("prune", "merge", "prune", "merge")
    assert "halves" not in repr(measured)
    chosen = ToFu(16, strategies=("prune", "merge", "merge", "merge"))
    assert chosen.measured(BENT) is chosen
