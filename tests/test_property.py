"""Any encoder is merged exactly, or refused with a reason: properties, not examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from depth import at_hand
from encoders import PATCHES, duplicates, pixels, with_zero_positions
from generated import Kind, Spelling, build, kinds, spellings, without_positions
from hypothesis import event, given
from hypothesis import strategies as st
from near_misses import NEAR_MISSES, near_miss
from profiles import examples
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import MergedModel, ToMe, TomeError

pytestmark = pytest.mark.usefixtures("captured_once")

LOSSLESS = 1e-4
COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=3)


def error(ours: Any, theirs: Any) -> float:
    """The largest relative error among the tensors of two outputs of the same form."""
    left, form = pytree.tree_flatten(ours)
    right, expected = pytree.tree_flatten(theirs)
    assert form == expected
    return max(relative_error(a, b) for a, b in zip(left, right, strict=True))


def merged_or_refused(model: nn.Module, counts: Any, x: Tensor) -> MergedModel | None:
    """The merged model; None if it is refused, and that with a reason."""
    try:
        merged = tomepass.apply(model, ToMe(counts), example_inputs=x)
    except TomeError as error_:
        refused = error_
    else:
        event("merged")
        return merged
    assert refused.reason
    assert refused.node
    event(f"refused: {refused.reason[:60]}")
    return None


def tokens_after(merged: MergedModel, x: Tensor) -> list[int]:
    return [block.tokens_out for block in merged.report(x).blocks]


# ---- whatever is composed --------------------------------------------------------------------


def test_any_encoder_is_lossless_on_duplicates_or_refused() -> None:
    outcomes: list[bool] = []

    @examples(3)
    @given(kind=kinds(), spelling=spellings(), counts=COUNTS)
    def check(kind: Kind, spelling: Spelling, counts: list[int]) -> None:
        model, x = without_positions(build(kind, spelling)), duplicates(2)
        counts = counts[: kind.depth]
        merged = merged_or_refused(model, counts, x)
        outcomes.append(merged is not None)
        if merged is not None:
            assert tokens_after(merged, x) == expected_tokens(kind, counts)
            assert error(merged(x), model(x)) < LOSSLESS

    with torch.no_grad():
        check()
    # Refusing everything would be no art.
    assert sum(outcomes) >= 0.9 * len(outcomes)


@examples(3)
@given(kind=kinds(), spelling=spellings())
def test_merging_nothing_changes_nothing_to_the_bit(kind: Kind, spelling: Spelling) -> None:
    model, x = build(kind, spelling), pixels(2)
    with torch.no_grad():
        merged = merged_or_refused(model, [0], x)
        assert merged is not None
        ours, theirs = (pytree.tree_leaves(m(x)) for m in (merged, model))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.deep
@examples(2)
@given(kind=kinds(), spelling=spellings())
def test_merged_encoders_agree_however_they_are_written(kind: Kind, spelling: Spelling) -> None:
    """Positions are not zero here, and no two tokens alike."""
    x, counts = pixels(3).double(), [8, 7, 6][: kind.depth]
    plain, other = (build(kind, how).double() for how in (Spelling(), spelling))
    with torch.no_grad():
        assert error(other(x), plain(x)) < LOSSLESS
        expected = tomepass.apply(plain, ToMe(counts), example_inputs=x)
        assert tokens_after(expected, x) == expected_tokens(kind, counts)
        merged = merged_or_refused(other, counts, x)
        if merged is not None:
            assert error(merged(x), expected(x)) < LOSSLESS


def expected_tokens(kind: Kind, counts: Sequence[int]) -> list[int]:
    """Tokens after each block: no count drawn here comes near half of what is left."""
    tokens, after = kind.start + PATCHES + kind.end, []
    for i in range(kind.depth):
        tokens -= counts[i] if i < len(counts) else 0
        after.append(tokens)
    return after


# ---- what must be merged ---------------------------------------------------------------------

# Each kind in a spelling of its own.
KINDS: dict[str, tuple[Kind, str]] = {
    "plain": (Kind(), "sdpa"),
    "post-norm, mean": (Kind(norm="post", readout="mean"), "operator"),
    "parallel, registers": (Kind(norm="parallel", start=5, end=2, readout="patches"), "folded"),
    "gated MLP, RMSNorm": (Kind(mlp="swiglu", norm_kind="rms", layer_scale=True), "baddbmm"),
    "RMSNorm by hand": (Kind(norm_kind="rms by hand", query_norm=True), "einsum"),
    "positions again": (Kind(position="every block"), "late einsum"),
    "rotary": (Kind(position="rotary", readout="dense"), "operator"),
    "rotary, patches only": (Kind(position="patch rotary", end=4, readout="grid"), "sdpa"),
    "rotary, no other tokens": (Kind(position="patch rotary", start=0, readout="mean"), "baddbmm"),
    "rotary, none behind": (Kind(position="patch rotary"), "sdpa"),
    "rotary, folded": (Kind(position="patch rotary", start=2, end=1), "folded"),
    "rotary, written late": (Kind(position="patch rotary", start=2), "late einsum"),
    "bias": (Kind(position="bias", readout="hidden"), "operator"),
    "bias as a mask": (Kind(position="bias", start=3, end=1, readout="dense"), "sdpa"),
    "bias, written late": (Kind(position="bias", start=0, readout="mean"), "late einsum"),
    "bias shared": (Kind(position="shared bias", start=0, readout="attention"), "einsum"),
    "bias gathered": (Kind(position="gathered bias", readout="class and patches"), "sdpa"),
    "pooled by attention": (Kind(start=0, readout="multihead"), "einsum"),
    "pooled, weights returned": (Kind(readout="multihead with weights"), "operator"),
    "pooled by softmax": (Kind(readout="softmax"), "sdpa"),
    "tokens at the end": (Kind(start=0, end=3, readout="last"), "folded"),
}
# Every position, norm, and readout of its own, and every spelling, at least once.
KINDS_AT_HAND = [
    *("post-norm, mean", "rotary, folded", "bias gathered", "tokens at the end"),
]
SPELLINGS: dict[str, Spelling] = {
    "sdpa": Spelling(qkv="fused", heads="permute", back="flatten", swapped=True),
    "operator": Spelling(product="operator", qkv="chunk", dropout=True, drop_path=True),
    "folded": Spelling(product="bmm", scale="query", softmax="float32", parting="slices"),
    "baddbmm": Spelling(product="baddbmm", heads="unflatten", softmax="typed", parting="copy"),
    "einsum": Spelling(product="einsum", qkv="interleaved", back="einsum", scale="divided"),
    "late einsum": Spelling(product="late einsum", scale="both", qkv="fused unbind"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(KINDS, KINDS_AT_HAND))
def test_these_are_merged(name: str) -> None:
    kind, written = KINDS[name]
    assert_merged(replace(kind, depth=3), SPELLINGS[written], [6, 5, 4])


def assert_merged(kind: Kind, spelling: Spelling, counts: list[int]) -> None:
    """Exactly these tokens, lossless; and not if sizes are left out of attention."""
    model, x = without_positions(build(kind, spelling)), duplicates(2)
    merged = tomepass.apply(model, ToMe(counts), example_inputs=x)
    unweighted = tomepass.apply(model, ToMe(counts, prop_attn=False), example_inputs=x)
    assert tokens_after(merged, x) == expected_tokens(kind, counts)
    assert merged.report(x).protected == (
        *range(kind.start),
        *range(kind.start + PATCHES, kind.start + PATCHES + kind.end),
    )
    expected = model(x)
    assert error(merged(x), expected) < LOSSLESS
    assert error(unweighted(x), expected) > 1e-3


# ---- near misses -----------------------------------------------------------------------------

ALL = [31, 25, 19]
AFTER = "after a merge"
OVER_ALL = "expected attention over all tokens"
# The tokens left after each block that is merged, or why it is refused. The second of three
# blocks is the near miss, so that it meets merged tokens, and the third reads what it made.
EXPECTED: dict[str, list[int] | str] = {
    "TalkingHeads": [31, 25],
    "TalkingHeadsWithBias": AFTER,
    "EinsumHeads": "expected keys made from the stream's tokens",
    "ConvolvedHeads": AFTER,
    "NormalisedHeads": AFTER,
    "SquaredWeights": "aten.mul changes what attention weights sum to",
    "MeanOfHeads": [31, 25],
    "GatedHeads": ALL,
    "GatedQueries": "laid out differently",
    "GatedKeys": "laid out differently",
    "GatedScores": "laid out differently",
    "GateOfPositions": "not provably all true",
    "GatedOutput": ALL,
    "Sigmoid": AFTER,
    "SharpenedWeights": "aten.pow changes what attention weights sum to",
    "Renormalised": AFTER,
    "Stabilised": AFTER,
    "Exponentials": AFTER,
    "SoftmaxPlusOne": AFTER,
    "Capped": ALL,
    "CentredKeys": ALL,
    "TopKeys": AFTER,
    "OverQueries": "something else than the keys",
    "WeightsTransposed": "something else than values",
    "WeightsTwice": "more than one product",
    "TwoValues": "more than one product",
    "DifferentialWeights": "aten.sub changes what attention weights sum to",
    "SharedQK": ALL,
    "SharedAll": ALL,
    "OneProduct": ALL,
    "OneKeyHead": ALL,
    "RepeatedKeyHead": ALL,
    "MaskFromScores": "not provably all true",
    "MaskOfKeys": "not provably all true",
    "NullKey": OVER_ALL,
    "PooledKeys": OVER_ALL,
    "ClassQueries": "only some of the tokens",
    "KeyOfNeighbour": OVER_ALL,
    "ConvolvedValues": AFTER,
    "MixedOverTokens": ALL,
    "SumOfValues": ALL,
    "SecondMoment": ALL,
    "AttentionTwice": "no residual sum",
    "SubtractedUpdate": "no residual sum",
    "Rolled": [31, 25],
    "RolledChannels": AFTER,
    "ConvolvedMlp": AFTER,
    "MixedTokens": ALL,
    "SlicedByPosition": ALL,
    "EverySecond": [31, 25],
    "ByContent": ALL,
    "NormalisedOverTokens": AFTER,
    "Whitened": ALL,
    "PositionGate": ALL,
    "OwnMlpOfClass": ALL,
    "ClassFromMean": ALL,
    "ClassLast": [31, 25],
    "TwoTokensInOne": [31, 25],
    "TwoAttentions": [31, 25],
    "AttentionOfAttention": [31, 25],
    "ChannelAttention": OVER_ALL,
    "Reverted": ALL,
    "KeysReturned": ALL,
    "KeysInHead": ALL,
    "KeysInNext": ALL,
    "KeysReused": "from before a merge",
    "WeightsReturned": ALL,
    "ScoresReturned": ALL,
    "ClassWeightsReturned": ALL,
    "WeightsSummed": ALL,
    "Rollout": "more than one product",
    "WeightsPooled": ALL,
    "WeightsOfWeights": ALL,
    "RealFormer": [31],
    "RealFormerAtLast": [31, 25],
    "WeightsReused": [31],
    "AddedTokens": [31],
    "ReplacedPrompts": [31],
    "DroppedClass": "only some of the tokens",
    "HalvedGrid": [31],
    "ClassLate": ALL,
    "Skipped": ALL,
    "Ensembled": ALL,
    "DenseGate": [31],
    "PaddedMask": "not provably all true",
}


def test_every_near_miss_is_expected_to_be_something() -> None:
    assert EXPECTED.keys() == NEAR_MISSES.keys()


# Every sixth: what they are near to stands beside each other in the table.
@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(EXPECTED, [*EXPECTED][::6]))
def test_a_near_miss_is_exact_or_refused(name: str) -> None:
    model, x = with_zero_positions(near_miss(name, readout="dense")), duplicates(2)
    expected = EXPECTED[name]
    if isinstance(expected, str):
        with pytest.raises(TomeError, match=expected) as caught:
            tomepass.apply(model, r=6, example_inputs=x)
        assert caught.value.node
        return
    merged = tomepass.apply(model, r=6, example_inputs=x)
    assert tokens_after(merged, x) == expected
    plain = model(x)
    assert error(merged(x), plain) < LOSSLESS
    if len(expected) > 1:  # an attention sees merged tokens
        unweighted = tomepass.apply(model, ToMe(6, prop_attn=False), example_inputs=x)
        assert error(unweighted(x), plain) > 1e-3


# It tells duplicates apart before they merge, so merging is no longer exact.
APART = {"ConvolvedValues"}


# The first block always merges: what comes later meets merged tokens, or does not change which
# tokens are alike until the last merge is done.
@examples(3)
@given(
    name=st.sampled_from(sorted(set(NEAR_MISSES) - APART)),
    place=st.integers(0, 2),
    readout=st.sampled_from(["class", "mean", "dense"]),
    first=st.integers(1, 6),
)
def test_a_near_miss_is_exact_or_refused_wherever_it_stands(
    name: str, place: int, readout: str, first: int
) -> None:
    model, x = with_zero_positions(near_miss(name, place, readout=readout)), duplicates(2)
    with torch.no_grad():
        # A list of counts may be longer than the stream; one count, and falling ones, are not.
        for r in (first, (first, -1.0)):
            merged = merged_or_refused(model, r, x)
            if merged is not None:
                assert error(merged(x), model(x)) < LOSSLESS
