"""ToMe with the choices of its ablations, in whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from depth import at_hand
from encoders import make, pixels
from zoo import COUNTS, make_inputs, make_model, relative_error

import tomepass
from tomepass import MLERP, ToMe, TomeBackend
from tomepass.capture.captured import read_state
from tomepass.handover.applied import make_applied
from tomepass.proof.recorded import record, reference_lines

FAMILIES = ("vit", "dinov2_registers", "siglip_vision", "ast")
CHOICES: tuple[dict[str, Any], ...] = (
    {"metric": "keys_all_heads"},
    {"metric": "queries"},
    {"metric": "values"},
    {"metric": "hidden"},
    {"similarity": "dot"},
    {"similarity": "euclidean"},
    {"similarity": "softmax"},
    {"combine": "mean"},
    {"combine": "max"},
    {"combine": "keep"},
    {"combine": MLERP("max")},
    {"combine": MLERP("mean")},
    {"partition": "sequential"},
    {"partition": "random", "seed": 5},
    {"partition": "random", "seed": 5, "combine": "keep"},
    {"importance": "class_attention"},
    {"importance": "class_attention", "similarity": "euclidean", "exponent": 1.0},
    {"importance": "class_attention", "metric": "keys_all_heads", "combine": MLERP()},
)
IDS = ["-".join(map(str, choice.values())) for choice in CHOICES]
# Every value of every choice in as few as make sense together.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"metric": "queries", "similarity": "dot", "combine": "mean"},
    {"metric": "hidden", "similarity": "softmax", "combine": "max", "partition": "sequential"},
    {
        "metric": "values",
        "similarity": "euclidean",
        "combine": "keep",
        "importance": "class_attention",
    },
    {"metric": "keys_all_heads", "combine": MLERP("mean"), "partition": "random", "seed": 5},
)
SMALL = make()
COMBINED = ("weighted_mean", "mean", "max", "keep", MLERP(), MLERP("mean"))


@pytest.mark.parametrize(
    ("family", "choice"),
    # What is read off an attention, in every family; what is done with it, in one.
    [
        pytest.param(
            *(family, choice),
            id=f"{family}-{'-'.join(map(str, choice.values()))}",
            # Beyond ViT each family meets a few of the choices every time, the others deep.
            marks=pytest.mark.deep if family != "vit" and number % 12 != turn else (),
        )
        for turn, family in enumerate(FAMILIES)
        for number, choice in enumerate(CHOICES)
        if family == "vit" or {"metric", "importance"} & set(choice)
    ],
)
@torch.no_grad()
def test_matches_and_merges_are_the_reference_s(
    family: str, choice: dict[str, Any], shared_models: Any
) -> None:
    model, inputs = shared_models[family], make_inputs(family)
    applied = make_applied(model, ToMe(COUNTS, **choice), inputs)
    values = [*read_state(model, applied.capture), *pytree.tree_leaves(inputs)]
    lines = list(reference_lines(record(applied, values), "matches"))
    assert [line.name.strip() for line in lines][:2] == ["matches", "merges against the reference"]
    for line in lines:
        assert line.passed, line
    merging = [block for block in applied.report.blocks if block.r]
    assert lines[0].note.startswith(f"{2 * len(merging)} matches")
    assert lines[1].note == f"{len(merging)} merges"


@pytest.mark.parametrize("choice", at_hand(CHOICES, CHOICES[::4], IDS))
@torch.no_grad()
def test_nothing_merged_is_the_original_and_one_image_as_in_a_batch(
    choice: dict[str, Any], shared_models: Any
) -> None:
    model, inputs = shared_models["vit"], make_inputs("vit", 3)
    expected = model(**inputs).logits
    assert torch.equal(tomepass.apply(model, ToMe(0, **choice))(**inputs).logits, expected)
    merged = tomepass.apply(model, ToMe(COUNTS, **choice), example_inputs=inputs)
    alone = {name: value[1:2] for name, value in inputs.items()}
    assert relative_error(merged(**alone).logits, merged(**inputs).logits[1:2]) < 1e-5


@pytest.mark.parametrize("choice", at_hand(CHOICES[::6], [CHOICES[12]], map(str, CHOICES[::6])))
@torch.no_grad()
def test_both_doors_agree(choice: dict[str, Any], shared_models: Any) -> None:
    model, inputs, method = shared_models["vit"], make_inputs("vit", 3), ToMe(COUNTS, **choice)
    one = tomepass.apply(model, method, example_inputs=inputs)(**inputs).logits
    two = torch.compile(model, backend=TomeBackend(method, inner="eager"))(**inputs).logits
    assert torch.equal(one, two)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("combine", at_hand(COMBINED, ["mean", MLERP()], map(str, COMBINED)))
@torch.no_grad()
def test_equal_tokens_merge_without_loss_however_they_are_combined(combine: Any) -> None:
    """Positions zeroed and one patch repeated: all patches are alike in every block."""
    model, inputs = make_model("vit"), make_inputs("vit")
    model.vit.embeddings.position_embeddings.zero_()
    inputs["pixel_values"] = (
        inputs["pixel_values"].mean((2, 3), keepdim=True).expand_as(inputs["pixel_values"])
    )
    expected = model(**inputs).logits
    merged = tomepass.apply(model, ToMe(COUNTS, combine=combine))(**inputs).logits
    assert relative_error(merged, expected) < 1e-5
    control = tomepass.apply(model, ToMe(COUNTS, combine=combine, prop_attn=False))(**inputs).logits
    assert relative_error(control, expected) > 1e-4


@pytest.mark.deep
@torch.no_grad()
def test_compiled_is_eager_and_an_exported_graph_is_plain_aten() -> None:
    method = ToMe(COUNTS, importance="class_attention", metric="keys_all_heads", combine=MLERP())
    model, inputs = make_model("vit"), make_inputs("vit")
    merged = tomepass.apply(model, method)
    torch._dynamo.reset()
    compiled = torch.compile(merged, fullgraph=True)(**inputs).logits
    assert relative_error(compiled, merged(**inputs).logits) < 1e-4
    torch._dynamo.reset()
    backend = torch.compile(model, backend=TomeBackend(method))(**inputs).logits
    assert relative_error(backend, merged(**inputs).logits) < 1e-4


@pytest.mark.usefixtures("shared_models")  # captured once
@pytest.mark.parametrize(
    "choice",
    at_hand(TOGETHER, TOGETHER[:1], ["-".join(map(str, choice.values())) for choice in TOGETHER]),
)
@torch.no_grad()
def test_every_choice_compiles(choice: dict[str, Any]) -> None:
    """Through AOTAutograd; tests/methods/test_generated_code.py makes code."""
    model, x = SMALL, pixels()
    merged = tomepass.apply(model, ToMe([9, 0], **choice), example_inputs=x)
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")(x)
    assert relative_error(compiled, merged(x)) < 1e-5
    assert relative_error(compiled, model(x)) > 1e-3


def test_a_random_partition_is_the_same_everywhere() -> None:
    """Ten free tokens: those that may go and those they may go to, for good."""
    features = torch.randn(1, 1, 11, 4)
    for seed, sources in ((5, [1, 2, 3, 4, 10]), (6, [1, 7, 8, 9, 10])):
        arguments = ([0], None, None, 0.3, "cosine", "random", seed)
        _, stands = torch.ops.tome.match_by(features, 0, *arguments)
        assert stands[0, 1:6].tolist() == sources


@pytest.mark.deep
@torch.no_grad()
def test_class_attention_of_a_model_without_a_class_token_is_that_of_all_tokens(
    shared_models: Any,
) -> None:
    model, inputs = shared_models["siglip_vision"], make_inputs("siglip_vision")
    applied = make_applied(model, ToMe(COUNTS, importance="class_attention"), inputs)
    assert applied.graph is not None
    nodes = applied.graph.graph.find_nodes(
        op="call_function", target=torch.ops.tome.attention_to.default
    )
    assert nodes
    assert all(list(node.args[3]) == [] for node in nodes)


@pytest.mark.deep
@pytest.mark.parametrize(
    "choice",
    at_hand(
        [{"metric": "queries"}, {"metric": "values"}, {"importance": "class_attention"}],
        [{"importance": "class_attention"}],
        ["queries", "values", "class_attention"],
    ),
)
@torch.no_grad()
def test_an_attention_written_out_is_read_like_a_fused_one(choice: dict[str, Any]) -> None:
    fused, written = make_model("vit"), make_model("vit_eager")
    written.load_state_dict(fused.state_dict())
    inputs, method = make_inputs("vit"), ToMe(COUNTS, **choice)
    ours, theirs = (
        tomepass.apply(model, method, example_inputs=inputs)(**inputs).logits
        for model in (written, fused)
    )
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"metric": "norm"}, "metric must be one of 'keys', .*, got 'norm'"),
        ({"similarity": "cos"}, "similarity must be one of 'cosine', .*, got 'cos'"),
        ({"combine": "mlerp"}, r"combine must be one of .*, or MLERP\(...\), got 'mlerp'"),
        ({"partition": "third"}, "partition must be one of"),
        ({"k": 3}, "k=3 does nothing with partition='alternating'"),
        ({"iterations": 5}, "iterations=5 does nothing with matching='bipartite'"),
        ({"matching": "greedy", "partition": "random"}, "partition=.*matching='greedy'"),
        ({"matching": "kmeans", "importance": "class_attention"}, "importance=.*matching='kmeans'"),
        ({"matching": "greedy", "similarity": "dot"}, "similarity='dot'.*matching='greedy'"),
        ({"importance": "norm"}, "importance must be one of"),
        ({"importance": "class_attention", "similarity": "dot"}, "importance=.*similarity='dot'"),
        ({"importance": "class_attention", "similarity": "softmax"}, "similarity='softmax'"),
        ({"seed": 3}, "seed=3 does nothing with partition='alternating'"),
        ({"exponent": 0.5}, "exponent=0.5 does nothing with importance='none'"),
        ({"partition": "random", "seed": -1}, "seed: expected 0 or more, got -1"),
        (
            {"importance": "class_attention", "exponent": 0.0},
            r"exponent: expected a number in \(0, 100\], got 0.0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ToMe(8, **fields)


def test_mlerp_knows_two_norms() -> None:
    with pytest.raises(ValueError, match="norm must be one of 'max', 'mean', got 'min'"):
        MLERP("min")  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
def test_choices_travel_as_json(choice: dict[str, Any]) -> None:
    method = ToMe(8, **choice)
    assert ToMe.from_json(method.to_json()) == method
    assert method != ToMe(8)
    for name, value in choice.items():
        assert f"{name}={value!r}" in repr(method)
