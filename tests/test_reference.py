"""The reference against hand-worked cases, published numbers and stored logits.

Angles stand for keys: the cosine of two keys is the cosine of the angle between them.
"""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import (
    Rate,
    Result,
    deit_forward,
    deit_logits,
    dinov2_with_registers_forward,
    dinov2_with_registers_logits,
    ijepa_forward,
    ijepa_logits,
    vit_forward,
    vit_hidden,
    vit_logits,
    vit_model_forward,
    weighted_mean,
)
from torch import Tensor, nn

from tomepass import reference

transformers = pytest.importorskip("transformers")

DATA = Path(os.environ.get("TOMEPASS_DATA", Path(__file__).parents[2] / "shared" / "data"))
ORACLE = DATA / "oracle.safetensors"
ROUNDING = 1e-6  # of a cosine of float32 keys, a few blocks deep
PUBLISHED_MEAN, PUBLISHED_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keys_at(*degrees: float, lengths: tuple[float, ...] | None = None) -> Tensor:
    """One image, one head, keys in the plane: `[1, 1, N, 2]`."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)
    if lengths is not None:
        keys = keys * torch.tensor(lengths, dtype=torch.float64)[:, None]
    return keys[None, None]


def matched(keys: Tensor, r: int, protected: tuple[int, ...] = ()) -> list[int]:
    (assign,) = reference.match(keys, r, protected).tolist()
    return list(assign)


# Match: positions 0, 2, 4 are sources, 1, 3, 5 destinations.
# Best edges: 0 -> 1 at 10 degrees, 2 -> 3 at 2 degrees, 4 -> 3 at 42 degrees.
SIX = keys_at(0, 10, 50, 48, 90, 200)


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (0, [0, 1, 2, 3, 4, 5]),
        (1, [0, 2, 3, 3, 1, 4]),  # 0 4 | 1 (2 3) 5
        (2, [1, 1, 2, 2, 0, 3]),  # 4 | (0 1) (2 3) 5
        (3, [0, 0, 1, 1, 1, 2]),  # (0 1) (2 3 4) 5: two sources, one destination
        (9, [0, 0, 1, 1, 1, 2]),  # at most half
    ],
)
def test_match_worked_by_hand(r: int, expected: list[int]) -> None:
    assert matched(SIX, r) == expected


def test_match_works_image_by_image() -> None:
    other = keys_at(0, 200, 50, 48, 90, 91)  # 2 -> 3 at 2 degrees, 4 -> 5 at 1 degree
    both = reference.match(torch.cat([SIX, other]), 2, ())
    assert both.tolist() == [[1, 1, 2, 2, 0, 3], [0, 1, 2, 2, 3, 3]]
    assert both.dtype == torch.int64


def test_match_averages_the_heads_before_it_normalises() -> None:
    # Token 0: (10, 0) and (0, 1) average to 6 degrees, next to token 1 at 0 degrees; normalised
    # first, they would average to 45 degrees, where token 3 is.
    head = torch.tensor([[10.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    keys = torch.stack([head, other])[None]
    assert matched(keys, 1) == [1, 1, 0, 2]


def test_match_compares_directions_not_lengths() -> None:
    # Token 0's nearest direction is token 1; the longer token 3 has the larger dot product.
    keys = keys_at(0, 10, 180, 60, lengths=(1, 1, 1, 9))
    assert matched(keys, 1) == [1, 1, 0, 2]


def test_ties_go_to_the_lower_source_and_the_lower_destination() -> None:
    same = torch.ones(1, 2, 6, 4)
    assert matched(same, 1) == [2, 2, 0, 3, 1, 4]
    assert matched(same, 2) == [1, 1, 1, 2, 0, 3]
    assert matched(same, 3) == [0, 0, 0, 1, 0, 2]


def test_equal_keys_tie_to_the_bit_whatever_their_position() -> None:
    # Every destination is the same vector: if rounding depended on the position, some source
    # would draw another than the first.
    torch.manual_seed(0)
    keys = torch.randn(1, 3, 131, 67)
    keys[:, :, 1::2] = keys[:, :, 1:2]
    for dtype in (torch.float32, torch.float64):
        assign = reference.match(keys, 60, (0,), dtype)[0]
        merged = [p for p in range(2, 131, 2) if assign[p] >= 131 - 60 - 65]
        assert len(merged) == 60
        assert {int(assign[p]) for p in merged} == {int(assign[1])}


def test_protected_in_front() -> None:
    # Token 1 would be the nearest of the class token, and 0 of nobody.
    keys = keys_at(0, 0, 50, 48, 90, 80, 200)
    assert matched(keys, 1, (0,)) == [0, 3, 4, 4, 1, 5, 2]  # 0 | 4 6 | 1 (2 3) 5
    assert matched(keys, 3, (0,)) == [0, 1, 2, 2, 3, 3, 3]  # 0 | | 1 (2 3) (4 5 6)


def test_protected_in_the_middle() -> None:
    # 3 and 4 are protected though 2, 3, 4 and 5 nearly coincide: 2 has to go to 5.
    keys = keys_at(0, 100, 50, 50, 50, 51)
    assert matched(keys, 1, (3, 4)) == [2, 3, 4, 0, 1, 4]  # 3 4 | 0 | 1 (2 5)
    assert matched(keys, 1, (4, 3)) == matched(keys, 1, (3, 4))
    assert matched(keys, 5, (3, 4)) == [3, 2, 3, 0, 1, 3]  # 3 4 | | 1 (0 2 5)


def test_protected_at_the_end() -> None:
    keys = keys_at(0, 10, 50, 48, 49, 50)
    assert matched(keys, 1, (5,)) == [1, 3, 2, 4, 4, 0]  # 5 | 0 2 | 1 (3 4)
    assert matched(keys, 1, (4, 5)) == [2, 3, 4, 4, 0, 1]  # 4 5 | 0 | 1 (2 3)


def test_the_order_of_the_unmerged_is_by_position_not_by_score() -> None:
    # Scores fall from 8 to 0: in score order the unmerged sources would be 8 4 0 or 0 4 8.
    keys = keys_at(60, 0, 1, 2, 40, 300, 8, 6, 30, 180)
    assert matched(keys, 2) == [0, 3, 3, 4, 1, 5, 6, 6, 2, 7]  # 0 4 8 | (1 2) 3 5 (6 7) 9


@pytest.mark.parametrize(
    ("r", "tokens", "protected", "expected"),
    [
        (16, 197, (0,), 16),
        (200, 197, (0,), 98),
        (16, 21, (0,), 10),
        (9, 6, (), 3),
        (9, 7, (), 3),
        (9, 6, (0, 1), 2),
        (9, 6, (0, 2), 1),  # one source left
        (9, 6, (0, 2, 4), 0),  # no source left
        (9, 6, (1, 3), 2),  # one destination takes all, but at most half merge
        (9, 6, (1, 3, 5), 0),  # no destination left
        (9, 1, (), 0),
        (9, 2, (0,), 0),
        (9, 0, (), 0),
        (0, 6, (), 0),
    ],
)
def test_cap(r: int, tokens: int, protected: tuple[int, ...], expected: int) -> None:
    assert reference.merge_count(r, tokens, protected) == expected
    assign = reference.match(torch.randn(2, 1, tokens, 4), r, protected)
    assert assign.shape == (2, tokens)
    if tokens:
        assert int(assign.max()) + 1 == tokens - expected


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        reference.match(SIX, -1, ())
    with pytest.raises(ValueError, match="protected"):
        reference.match(SIX, 1, (6,))


def test_nan_is_the_lowest_score() -> None:
    keys = SIX.clone()
    keys[0, 0, 0] = math.nan  # was the second best source: 4 takes its turn
    assert matched(keys, 2) == [0, 1, 2, 2, 2, 3]
    assert matched(keys, 3) == [0, 0, 1, 1, 1, 2]  # asked for all: the first destination is drawn
    # A NaN destination is drawn only where all are NaN, a protected one never.
    keys = SIX.clone()
    keys[0, 0, 3] = math.nan
    assert matched(keys, 1) == [2, 2, 0, 3, 1, 4]
    keys[:] = math.nan
    assert matched(keys, 1, (1,)) == [3, 0, 1, 3, 2, 4]


def test_zero_keys_score_zero() -> None:
    keys = SIX.clone()
    keys[0, 0, 2] = 0.0
    assert matched(keys, 1) == [2, 2, 0, 3, 1, 4]


def test_no_gradient_through_the_matching() -> None:
    keys = SIX.clone().requires_grad_()
    assert not reference.match(keys, 1, ()).requires_grad


@pytest.mark.parametrize("protected", [(), (0,), (0, 1, 2, 3, 4), (3, 7), (40,)])
def test_match_against_its_own_definition(protected: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    tokens, r = 41, 7
    keys = torch.randn(5, 3, tokens, 8, dtype=torch.float64)
    assign = reference.match(keys, r, protected)
    for image, places in zip(keys, assign.tolist(), strict=True):
        groups: dict[int, list[int]] = {}
        for position, place in enumerate(places):
            groups.setdefault(place, []).append(position)
        assert sorted(groups) == list(range(tokens - r))
        assert [groups[place] for place in range(len(protected))] == [[p] for p in protected]

        metric = torch.nn.functional.normalize(image.mean(0), dim=-1)
        cosine = metric @ metric.T
        cosine[list(protected)] = -math.inf
        cosine[:, list(protected)] = -math.inf
        cosine[1::2] = -math.inf
        cosine[:, ::2] = -math.inf
        score, drawn = cosine.max(dim=-1)
        merged = score.topk(r).indices.tolist()
        assert all(places[p] == places[int(drawn[p])] for p in merged)

        left = [p for p in range(tokens) if p not in merged and p not in protected]
        rest = [p for p in left if p % 2 == 0] + [p for p in left if p % 2 == 1]
        assert [places[p] for p in rest] == list(range(len(protected), tokens - r))


def test_float32_agrees_wherever_the_margin_is_wide() -> None:
    torch.manual_seed(2)
    keys = torch.randn(8, 3, 65, 16)
    wide = reference.match_margin(keys, 9, (0,)) > 1e-5
    assert int(wide.sum()) >= 6
    exact, rounded = (
        reference.match(keys[wide], 9, (0,), dtype) for dtype in (torch.float64, torch.float32)
    )
    assert torch.equal(exact, rounded)


def test_margin_worked_by_hand() -> None:
    def cos(degrees: float) -> float:
        return math.cos(math.radians(degrees))

    # r=1: 2 -> 3 (2 degrees), second best destination 1 (40), next edge 0 -> 1 (10).
    # r=2: 0 -> 1, second best 3 (48), next edge 4 -> 3 (42); r=3: 4 -> 3, second best 1 (80).
    one, two = cos(2) - cos(10), cos(10) - cos(42)
    three = min(cos(2) - cos(40), cos(10) - cos(48), cos(42) - cos(80))
    for r, expected in ((1, one), (2, min(two, three)), (3, three)):
        margin = reference.match_margin(SIX, r, ())
        assert margin.tolist() == pytest.approx([expected])


def test_margin_of_a_tie_and_of_no_choice() -> None:
    assert reference.match_margin(torch.ones(2, 1, 6, 4), 1, ()).tolist() == [0.0, 0.0]
    assert reference.match_margin(SIX, 0, ()).tolist() == [math.inf]
    assert reference.match_margin(keys_at(0, 10), 1, ()).tolist() == [math.inf]
    assert reference.match_margin(SIX * math.nan, 1, ()).tolist() == [math.inf]


# Merge, unmerge, compose, attention


def test_merge_worked_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [4.0, 8.0], [7.0, 1.0]]])
    size = torch.tensor([[1.0, 2.0, 5.0]])
    merged, sizes = reference.merge(x, size, torch.tensor([[1, 1, 0]]), 2)
    torch.testing.assert_close(merged, torch.tensor([[[7.0, 1.0], [3.0, 16 / 3]]]))
    assert sizes.tolist() == [[5.0, 3.0]]
    assert merged.dtype == sizes.dtype == torch.float32


def test_merge_keeps_the_total() -> None:
    torch.manual_seed(3)
    x, size = torch.randn(3, 17, 5, dtype=torch.float64), torch.ones(3, 17)
    total = x.sum(dim=1)
    for left in (12, 8, 5, 3):
        count = x.shape[1] - left
        assign = reference.match(torch.randn(3, 2, x.shape[1], 4), count, (0,))
        x, size = reference.merge(x, size, assign, left)
        assert x.shape[:2] == size.shape == (3, left)
        assert size.sum(dim=1).tolist() == [17.0] * 3
        assert size[:, 0].tolist() == [1.0] * 3
        torch.testing.assert_close((x * size[..., None]).sum(dim=1), total)


def test_merge_passes_gradients_by_weight() -> None:
    x = torch.zeros(1, 3, 1, requires_grad=True)
    merged, _ = reference.merge(x, torch.tensor([[1.0, 3.0, 1.0]]), torch.tensor([[1, 1, 0]]), 2)
    (gradient,) = torch.autograd.grad(merged.sum(), x)
    assert gradient.flatten().tolist() == [0.25, 0.75, 1.0]


def test_unmerge_and_compose() -> None:
    first, second = torch.tensor([[0, 1, 2, 2, 1]]), torch.tensor([[1, 0, 1]])
    source = reference.compose(second, first)
    assert source.tolist() == [[1, 0, 1, 1, 0]]
    full = reference.unmerge(torch.tensor([[[10.0], [20.0]]]), source)
    assert full.flatten().tolist() == [20.0, 10.0, 20.0, 20.0, 10.0]


def test_proportional_attention_equals_attention_to_copies() -> None:
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind(0)
    copies = torch.tensor([1, 4, 2, 1, 3])
    full_k, full_v = (t.repeat_interleave(copies, dim=2) for t in (k, v))
    got = reference.proportional_attention(q, k, v, copies.expand(2, -1))
    torch.testing.assert_close(got, reference.proportional_attention(q, full_k, full_v))


def test_attention_without_sizes_is_attention() -> None:
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind(0)
    attend = nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(reference.proportional_attention(q, k, v), attend(q, k, v))
    torch.testing.assert_close(
        reference.proportional_attention(q, k, v, torch.ones(2, 5), scale=0.5),
        attend(q, k, v, scale=0.5),
    )


# Schedules


@pytest.mark.parametrize(
    ("r", "blocks", "expected"),
    [
        (8, 3, [8, 8, 8]),
        (0, 2, [0, 0]),
        ([8, 4], 4, [8, 4, 0, 0]),
        ([], 2, [0, 0]),
        ((8, 0.0), 4, [8, 8, 8, 8]),
        ((8, -1.0), 5, [16, 12, 8, 4, 0]),
        ((8, 1.0), 5, [0, 4, 8, 12, 16]),
        ((8, -1), 4, [16, 10, 5, 0]),  # 16, 10.67, 5.33, 0
        ((8, 0.5), 5, [4, 6, 8, 10, 12]),
        ((7, 0.5), 3, [3, 7, 11]),  # lo = int(3.5)
        ((13, -1), 12, [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
        ((15, 1), 12, [0, 2, 5, 8, 10, 13, 16, 19, 21, 24, 27, 30]),  # a step rounds below 30 / 11
        ((8, -1), 1, [8]),
    ],
)
def test_schedule(r: Rate, blocks: int, expected: list[int]) -> None:
    assert reference.schedule(r, blocks) == expected


@pytest.mark.parametrize("r", [-1, [1, -1], [1, 1, 1, 1], (8, 1.5), (8, -1.5), (-8, 0.5)])
def test_bad_schedules_are_refused(r: Rate) -> None:
    with pytest.raises(ValueError, match=r"count"):
        reference.schedule(r, 3)


def test_a_schedule_is_not_the_callers_list() -> None:
    given = [3, 2, 1]
    assert reference.schedule(given, 3) is not given
    assert given == [3, 2, 1]


def tokens_after(r: Rate, blocks: int, tokens: int) -> list[int]:
    """Token counts after each block, with a class token."""
    counts = []
    for wanted in reference.schedule(r, blocks):
        tokens -= reference.merge_count(wanted, tokens, (0,))
        counts.append(tokens)
    return counts


def test_published_token_counts_of_vit_l_at_384() -> None:
    counts = tokens_after(25, 24, 577)
    after = {block: counts[block - 1] for block in (8, 16, 22, 23, 24)}
    assert after == {8: 377, 16: 177, 22: 27, 23: 14, 24: 8}


@pytest.mark.parametrize(
    ("patch", "width", "blocks", "r", "expected"),
    [
        (16, 1024, 24, 8, 30.963),
        (16, 1024, 24, (8, -1), 22.325),
        (14, 1280, 32, 7, 92.835),
        (14, 1280, 32, (7, -1), 72.547),
    ],
)
def test_multiply_accumulates(
    patch: int, width: int, blocks: int, r: Rate, expected: float
) -> None:
    before = (224 // patch) ** 2 + 1
    macs = (before - 1) * width * 3 * patch**2 + width * 1000
    for after in tokens_after(r, blocks, before):
        macs += (4 * before + 8 * after) * width**2 + 2 * before**2 * width
        before = after
    assert macs / 1e9 == pytest.approx(expected, abs=5e-4)


# Whole models, small and random

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WIDE: dict[str, Any] = {**SMALL, "intermediate_size": 64}


def vit_config() -> Any:
    return transformers.ViTConfig(**WIDE)


def make_vit() -> Any:
    return transformers.ViTForImageClassification(vit_config())


def make_vit_model() -> Any:
    return transformers.ViTModel(vit_config())


def make_deit() -> Any:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**WIDE))


def make_ijepa() -> Any:
    return transformers.IJepaForImageClassification(transformers.IJepaConfig(**WIDE))


def make_dinov2(swiglu: bool = False) -> Any:
    config = transformers.Dinov2WithRegistersConfig(
        **SMALL, mlp_ratio=2, num_register_tokens=4, layerscale_value=0.7, use_swiglu_ffn=swiglu
    )
    return transformers.Dinov2WithRegistersForImageClassification(config)


def make_dinov2_swiglu() -> Any:
    return make_dinov2(swiglu=True)


def scaled_up(model: Any) -> Any:
    """A freshly initialised model hardly attends: make every weight count."""
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "lambda" not in name:
                parameter.normal_(std=0.3 if parameter.dim() > 1 else 0.1)
    return model.eval()


MODELS = [
    pytest.param(make_vit, vit_forward, vit_logits, 1, id="vit"),
    pytest.param(make_vit_model, vit_model_forward, vit_hidden, 1, id="vit-model"),
    pytest.param(make_deit, deit_forward, deit_logits, 2, id="deit"),
    pytest.param(make_ijepa, ijepa_forward, ijepa_logits, 0, id="ijepa"),
    pytest.param(
        make_dinov2, dinov2_with_registers_forward, dinov2_with_registers_logits, 5, id="dinov2"
    ),
    pytest.param(
        make_dinov2_swiglu,
        dinov2_with_registers_forward,
        dinov2_with_registers_logits,
        5,
        id="dinov2-swiglu",
    ),
]


def pixels(images: int = 2) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(images, 3, 32, 32)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("make", "forward", "output", "protected"), MODELS)
def test_unmerged_forward_is_the_models_own(
    make: Any, forward: Any, output: Any, protected: int
) -> None:
    model, x = scaled_up(make()), pixels()
    own = model(x)
    expected = own.logits if "logits" in own else own.last_hidden_state
    for prop_attn in (True, False):
        got = output(model, x, 0, prop_attn)
        assert relative_error(got, expected) < 1e-5
    assert forward(model, x, 0).counts == [16 + protected] * 4


@torch.no_grad()
@pytest.mark.parametrize(("make", "forward", "output", "protected"), MODELS)
def test_merged_forward_keeps_its_books(
    make: Any, forward: Any, output: Any, protected: int
) -> None:
    model, x = scaled_up(make()), pixels()
    result: Result = forward(model, x, [3, 0, 2, 9], with_margin=True)
    total = 16 + protected
    counts = [total - 3, total - 3, total - 5]
    counts.append(counts[-1] - (counts[-1] - protected) // 2)
    assert result.counts == counts
    assert result.hidden.shape == (2, counts[-1], 32)
    assert torch.equal(output(model, x, [3, 0, 2, 9]), result.output)
    for source, size in zip(result.source, result.size, strict=True):
        assert torch.equal(source.bincount(minlength=counts[-1]), size.long())
        assert source[:protected].tolist() == list(range(protected))
    assert size[:protected].tolist() == [1.0] * protected
    assert bool((result.margin > 0).all())


@torch.no_grad()
@pytest.mark.parametrize(("make", "forward", "output", "protected"), MODELS)
def test_lossless_on_duplicates(make: Any, forward: Any, output: Any, protected: int) -> None:
    # Without positions, equal patches stay equal: one that stands for all of them, with its size,
    # changes nothing. The shares are uneven, or forgetting the size would not show.
    model = scaled_up(make())
    base = getattr(model, model.base_model_prefix, model)
    base.embeddings.position_embeddings.zero_()
    patches = pixels(3)[:, :, :8, :8], pixels(3)[:, :, 8:16, 8:16], pixels(3)[:, :, 16:24, :8]
    layout = [0, 0, 1, 1, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 1]
    rows = [torch.cat([patches[p] for p in layout[i : i + 4]], dim=3) for i in range(0, 16, 4)]
    x = torch.cat(rows, dim=2)

    full: Result = forward(model, x, 0)
    merged: Result = forward(model, x, [4, 3, 2, 1])
    assert merged.counts[-1] == 6 + protected
    for source in merged.source[:, protected:].tolist():
        held = zip(source, layout, strict=True)
        assert len(set(held)) == 6, "merged unequal patches"

    unmerged = reference.unmerge(merged.hidden, merged.source)
    plain = forward(model, x, [4, 3, 2, 1], prop_attn=False)
    assert relative_error(unmerged, full.hidden) < 1e-4
    assert relative_error(reference.unmerge(plain.hidden, plain.source), full.hidden) > 1e-2
    if full.output is not full.hidden:
        assert relative_error(merged.output, full.output) < 1e-4
        assert relative_error(plain.output, full.output) > 1e-3


def test_pooling_weights_by_size() -> None:
    x = torch.tensor([[[1.0], [4.0]]])
    assert weighted_mean(x, torch.tensor([[2.0, 1.0]])).tolist() == [[2.0]]


# Stored logits of a trained model


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    if not ORACLE.exists():
        pytest.skip("no data folder (TOMEPASS_DATA)")
    return dict(pytest.importorskip("safetensors.torch").load_file(ORACLE))


@pytest.fixture(scope="module")
def deit_tiny(oracle: dict[str, Tensor]) -> Any:
    folder = DATA / "deit_tiny"
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["r0_prop", "r8_prop", "r8_noprop", "r16_prop", "r16_noprop"])
def test_reproduces_stored_logits(oracle: dict[str, Tensor], deit_tiny: Any, name: str) -> None:
    mean, std = (torch.tensor(t)[:, None, None] for t in (PUBLISHED_MEAN, PUBLISHED_STD))
    x = (oracle["pixels_uint8"] / 255 - mean) / std
    stored = oracle[f"logits_{name}"]
    rate, mode = name.removeprefix("r").split("_")
    got = vit_forward(deit_tiny, x, int(rate), mode == "prop", with_margin=True)

    clear = got.margin > ROUNDING
    torch.testing.assert_close(got.output[clear], stored[clear], atol=1e-3, rtol=0)
    assert int(clear.sum()) >= len(x) - 1
    for image in (~clear).nonzero().flatten().tolist():
        # Two destinations closer than float32 tells apart: which one the stored logits took is
        # chance, but they must be within reach of a rounding, which also flips it at random.
        noise = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(0))
        near = vit_logits(deit_tiny, x[image] * (1 + 1e-6 * noise), int(rate), mode == "prop")
        error = (near - stored[image]).abs().amax(dim=1)
        assert float(error.min()) < 1e-3
