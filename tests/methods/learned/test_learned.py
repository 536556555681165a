"""Learned policies: their operators, their training, and the values they are."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from depth import at_hand
from table import ROWS
from torch import Tensor
from zoo import make_inputs, make_model, make_vit, output_of, relative_error

import tomepass
from tomepass import TomeBackend, TomeError, digits, train_policy
from tomepass.calibration import training
from tomepass.methods import AdaViT, DynamicViT, Learned, Policy, Prune
from tomepass.ops.attending.soft import gumbel_keep, masked_attention
from tomepass.ops.dropping.keep_score import drawn, used_size
from tomepass.ops.dropping.prune import nearest

KINDS = [DynamicViT, AdaViT]
SURE = 1e6  # odds times this are not changed by a draw
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
# Trainings take long: of one kind every time.
one_kind = pytest.mark.parametrize(
    "kind", at_hand(KINDS, [DynamicViT], [kind.name for kind in KINDS])
)


def trained(kind: type[Learned] = DynamicViT, **fields: Any) -> Any:
    """With random weights for three blocks of width 32."""
    return ROWS[kind.name].make([5, 0, 9], **fields)


def batches(count: int = 2, images: int = 3) -> list[Tensor]:
    return [make_inputs("vit", images, seed=i)["pixel_values"] for i in range(count)]


def short(model: Any, method: Any, seed: int = 0, **options: Any) -> Any:
    return train_policy(model, method, batches(), epochs=2, seed=seed, progress=False, **options)


# ---- operators ---------------------------------------------------------------------------------


def test_a_gumbel_mask_is_drawn_by_the_odds_and_has_gradients() -> None:
    torch.manual_seed(0)
    score = torch.linspace(-3, 3, 8).repeat(4000, 1).requires_grad_()
    mask = gumbel_keep(score, None, [0, 3], 6, fewer=True)
    assert bool((mask[:, [0, 3]] == 1).all())
    free = [1, 2, 4, 5, 6, 7]
    odds = score[0, free].sigmoid()
    torch.testing.assert_close((mask[:, free] > 0.5).float().mean(0), odds, rtol=0, atol=0.03)
    mask.sum().backward()
    assert score.grad is not None
    assert bool((score.grad[:, free].sum(0) > 0).all())
    assert not score.grad[:, [0, 3]].any()


def test_a_token_that_went_stays_away_and_the_likelier_stay() -> None:
    score = SURE * torch.tensor([[2.0, -1.0, 1.0, -0.1]])
    assert gumbel_keep(score, None, [], 3, fewer=True).tolist() == [[1, 0, 1, 0]]
    assert gumbel_keep(score, None, [], 1, fewer=True).tolist() == [[1, 0, 0, 0]]
    assert gumbel_keep(-score.abs(), None, [], 2, fewer=True).tolist() == [[0, 0, 0, 1]]
    before = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert gumbel_keep(score, before, [3], 2, fewer=True).tolist() == [[0, 0, 1, 1]]


def test_as_many_are_drawn_as_are_counted() -> None:
    torch.manual_seed(0)
    score = torch.randn(50, 9).requires_grad_()
    first = gumbel_keep(score, None, [0], 5)
    second = gumbel_keep(score, first, [0], 2)
    assert (first > 0.5).sum(-1).tolist() == [6] * 50
    assert (second > 0.5).sum(-1).tolist() == [3] * 50
    assert bool((second <= first).all())
    second[:, 1:].square().sum().backward()
    assert score.grad is not None
    assert bool((score.grad[:, 1:].abs().sum(0) > 0).all())
    likeliest = gumbel_keep(SURE * score, None, [0], 3)[:, 1:]
    assert torch.equal(likeliest > 0.5, score[:, 1:] >= score[:, 1:].topk(3).values[:, -1:])


def test_a_draw_is_logistic_and_the_same_for_every_image() -> None:
    torch.manual_seed(0)
    odds = torch.randn(3, 400, dtype=torch.float64)
    noise = drawn(odds, 400, 1) - odds
    torch.testing.assert_close(noise[0], noise[2])
    places = torch.arange(1, 400, 40) / 400
    torch.testing.assert_close(
        noise[0].sigmoid().quantile(places.double()), places.double(), rtol=0, atol=0.01
    )
    assert not torch.equal(noise, drawn(odds, 400, 2) - odds)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_masked_attention_is_attention_over_the_tokens_kept(own: bool, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 3, 7, 7, dtype=torch.float64)
    keep = torch.tensor([[1.0, 0, 1, 1, 0, 1, 0], [1.0, 1, 0, 0, 0, 0, 1]], requires_grad=True)
    ours = masked_attention(q, k, v, keep, bias, scale, own)
    for image in range(2):
        kept = keep[image].nonzero()[:, 0]
        for row in range(7):
            seen = torch.unique(torch.cat([kept, torch.tensor([row])])) if own else kept
            among = (t[image, :, seen] for t in (k, v))
            mask = bias[0, :, [row]][..., seen]
            query = q[image, :, [row]]
            theirs = F.scaled_dot_product_attention(query, *among, attn_mask=mask, scale=scale)
            torch.testing.assert_close(ours[image, :, [row]], theirs)
    ours.square().sum().backward()
    assert keep.grad is not None
    assert bool((keep.grad != 0).all())


def test_below_even_odds_a_token_is_out_of_use_unless_it_is_the_last() -> None:
    stands = torch.tensor([[0, 2, 3, 4]])
    score = torch.tensor([[-9.0, 7.0, -0.1, 0.0, -2.0]])
    assert used_size(score, None, stands, [0]).tolist() == [[1, 0, 1, 0]]
    before = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]])
    assert used_size(score, before, stands, [0]).tolist() == [[1, 1, 0, 0]]
    nothing = torch.full((1, 5), float("nan"))
    assert used_size(nothing, None, stands, [0]).tolist() == [[1, 1, 0, 0]]


def test_what_is_out_of_use_is_found_at_the_most_similar_token_in_use() -> None:
    keys = torch.tensor([[1.0, 0], [1, 0.1], [0.9, 0.1], [0, 1], [0.1, 1]])[None, None]
    stands, size = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    assert nearest(keys, stands, [0], size).tolist() == [[0, 2, 2, 3, 3]]


# ---- the training form -------------------------------------------------------------------------


@torch.no_grad()
def with_weights(form: Any, method: Any) -> Any:
    for index, held in form.weights.items():
        for name, weight in held.items():
            weight.copy_(method.policy.weights(index)[name])
    return form


def sure(method: Any) -> Any:
    """With the weights of its last layer so large that it is."""
    blocks = {i: method.policy.weights(i) for i in method.policy.blocks}
    for held in blocks.values():
        last = [
            name for name in held if name.partition(".")[0] in ("out", "token", "class", "bias")
        ]
        held.update({name: SURE * held[name] for name in last})
    return method.replace(policy=Policy(blocks))


@pytest.mark.parametrize(
    ("family", "kind"),
    at_hand(
        itertools.product(["vit", "dinov2_registers", "siglip_vision"], KINDS),
        [("vit", DynamicViT), ("dinov2_registers", AdaViT)],
    ),
)
@torch.no_grad()
def test_the_training_form_computes_what_is_used(
    family: str, kind: type[Learned], shared_models: Any
) -> None:
    """Where the policy is sure, and a draw changes nothing, the mask is the tokens kept."""
    model, inputs = shared_models[family], make_inputs(family, 3)
    method = sure(ROWS[kind.name].make([4, 4, 4]))
    form = training._Training(model, method, inputs)
    with_weights(form, method)
    call = form.binding.bind(inputs)
    values = [*training.read_state(model, form.capture), *call.values()]
    outputs, masks = form.graph(*values)
    protected = len(form.stream.plan.protected)
    counts = torch.stack([mask[:, protected:].sum(-1) for mask in masks])
    tokens = form.stream.plan.tokens - protected
    assert bool((counts[0] <= tokens - 4).all())
    assert bool((counts[-1] >= 2).all())
    assert bool((counts[-1] < counts[0]).all())
    assert method.holes or counts[:, 0].tolist() == [tokens - 4, tokens - 8, tokens - 12]
    ours = output_of(family, torch.utils._pytree.tree_unflatten(outputs, form.capture.out_spec))
    merged = tomepass.apply(model, method, example_inputs=inputs)
    theirs = output_of(family, merged(**inputs))
    if theirs.ndim == 3:  # what stands in for tokens that went is another matter
        ours, theirs = ours[:, :protected], theirs[:, :protected]
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(ours, output_of(family, model(**inputs))[:, : ours.shape[1]]) > 1e-3


@one_kind
def test_training_changes_the_policy_alone(kind: type[Learned], vit: Any) -> None:
    # After the last block nothing reads the tokens but the class token's own head.
    method = kind(keep_rate=0.5, blocks=(0, 1))
    before = copy.deepcopy(vit.state_dict())
    torch.manual_seed(5)
    random = torch.get_rng_state()
    learned = short(vit, method)
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(learned, kind)
    assert learned.replace(policy=None) == method
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in vit.parameters())
    start = short(vit, method, learning_rate=1e-12)
    assert learned.policy is not None
    for index in learned.policy.blocks:
        ours, theirs = learned.policy.weights(index), start.policy.weights(index)
        assert not any(torch.equal(ours[name], theirs[name]) for name in ours), index
    merged = tomepass.apply(vit, learned, example_inputs=batches()[0])
    assert merged(batches()[0]).logits.isfinite().all()


@pytest.mark.deep
@every_kind
def test_the_same_seed_gives_the_same_weights(kind: type[Learned], vit: Any) -> None:
    method = kind([9, 0, 9])
    first = short(vit, method)
    assert first.policy.blocks == (0, 2)
    assert short(vit, method) == first
    assert hash(short(vit, method)) == hash(first)
    assert short(vit, method, seed=1) != first
    assert short(vit, first) == first  # what it had is not built on


@pytest.mark.deep
def test_labels_and_returned_tokens_take_part(vit: Any) -> None:
    method = DynamicViT(keep_rate=0.5)
    plain = short(vit, method)
    pairs = [(x, torch.arange(3)) for x in batches()]
    options: Any = {"epochs": 2, "progress": False}
    assert train_policy(vit, method, pairs, labels=True, **options) != plain
    hidden = [{"pixel_values": x, "output_hidden_states": True} for x in batches()]
    assert train_policy(vit, method, hidden, **options) != plain


def test_a_model_that_returns_tokens_alone_teaches_by_them(shared_models: Any) -> None:
    model = shared_models["siglip_vision"]
    inputs = [make_inputs("siglip_vision", 3)]
    method = train_policy(model, DynamicViT(keep_rate=0.5), inputs, epochs=1, progress=False)
    assert method.policy is not None
    assert method.policy.blocks == (0, 1, 2)


@torch.no_grad()
def test_the_shares_kept_take_part_by_their_distance_from_those_planned(
    vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that keeps one token where 59 and 50 of 64 are planned."""
    method = sure(trained(AdaViT))
    form = with_weights(training._Training(vit, method, batches()[0]), method)
    for weights in form.weights.values():
        weights["bias"].sub_(20 * SURE)  # below even odds all of them: the likeliest stays

    def loss() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return float(form.loss(batches()[0], None))

    far = loss()
    monkeypatch.setattr(training, "rate_loss", lambda masks, rates: torch.zeros(()))
    counted = far - loss()
    # DynamicViT, section 4.1: the squared distances, the mean over blocks, count twice.
    squared = [(1 / 64 - planned / 64) ** 2 for planned in (59, 50)]
    assert counted == pytest.approx(2 * sum(squared) / 2, rel=1e-4)


def test_the_distance_of_shares_is_the_mean_over_images_and_blocks() -> None:
    masks = [torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
    found = training.rate_loss(masks, [0.75, 0.5])
    assert float(found) == pytest.approx((2 * 0.25**2 + 0.5**2 + 0) / 4)


def test_a_bias_of_positions_goes_along_in_training() -> None:
    model, inputs = make_model("beit"), make_inputs("beit", 3)
    form = with_weights(training._Training(model, trained(AdaViT), inputs), trained(AdaViT))
    loss = form.loss(inputs, None)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in form.parameters())


# ---- as values ---------------------------------------------------------------------------------


def test_a_policy_is_compared_by_content(tmp_path: Path) -> None:
    policy = trained().policy
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert again is not policy
    assert hash(again) == hash(policy)
    policy.save(tmp_path / "policy.safetensors")
    assert Policy.load(tmp_path / "policy.safetensors") == policy
    other = {i: policy.weights(i) for i in policy.blocks}
    other[1]["out.bias"] = other[1]["out.bias"] + 1e-6
    assert Policy(other) != policy
    assert policy != "policy"
    assert repr(policy).startswith("Policy(")
    assert "of blocks 0, 1, 2" in repr(policy)


@pytest.mark.deep
@every_kind
@torch.no_grad()
def test_an_applied_module_is_pickled_and_copied_with_its_policy(
    kind: type[Learned], vit: Any, images: Tensor
) -> None:
    merged = tomepass.apply(vit, trained(kind), example_inputs=images)
    expected = merged(images).logits
    for again in (pickle.loads(pickle.dumps(merged)), copy.deepcopy(merged)):
        assert again.method == merged.method
        assert torch.equal(again(images).logits, expected)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    at_hand(itertools.product(KINDS, [torch.bfloat16, torch.float64]), [(AdaViT, torch.bfloat16)]),
)
@torch.no_grad()
def test_weights_follow_the_dtype_of_the_stream(
    kind: type[Learned], dtype: torch.dtype, vit: Any, images: Tensor
) -> None:
    merged = tomepass.apply(vit, trained(kind), example_inputs=images)
    narrow = merged(images).logits
    merged.to(dtype)
    ours = merged(images.to(dtype)).logits
    assert ours.dtype is dtype
    if dtype is torch.float64:
        assert relative_error(narrow, ours) < 1e-4
    else:
        assert ours.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        merged.to(torch.float32)
        assert merged(images).logits.isfinite().all()


@pytest.mark.deep
@every_kind
@torch.no_grad()
def test_the_backend_freezes_it_with_inductor(
    kind: type[Learned], vit: Any, images: Tensor
) -> None:
    method = trained(kind)
    expected = tomepass.apply(vit, method, example_inputs=images)(images).logits
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(vit, backend=TomeBackend(method))
        assert relative_error(compiled(images).logits, expected) < 1e-4


@torch.no_grad()
def test_an_applied_module_is_exported_with_its_policy(vit: Any, images: Tensor) -> None:
    merged = tomepass.apply(vit, trained(), example_inputs=images)
    program = torch.export.export(merged, (images,), strict=False).run_decompositions()
    ours = program.module()(images).logits
    assert relative_error(ours, merged(images).logits) < 1e-5


# ---- refusals ----------------------------------------------------------------------------------


@every_kind
def test_an_untrained_method_is_refused(kind: type[Learned], vit: Any, images: Tensor) -> None:
    method = kind(keep_rate=0.5)
    told = rf"{kind.__name__} .* not trained(.|\n)*tomepass.train_policy"
    for door in (tomepass.apply, tomepass.explain):
        with pytest.raises(TomeError, match=told):
            door(vit, method, example_inputs=images)
    with pytest.raises(Exception, match=told):
        torch.compile(vit, backend=TomeBackend(method, inner="eager"))(images)


def test_a_policy_for_other_blocks_or_another_model_is_refused(vit: Any, images: Tensor) -> None:
    policy = trained().policy
    fewer = Policy({0: policy.weights(0)})
    with pytest.raises(TomeError, match=r"block 2 is to lose tokens.*blocks 0 alone"):
        tomepass.apply(vit, DynamicViT([5, 0, 9], policy=fewer), example_inputs=images)
    with pytest.raises(TomeError, match="for another method than AdaViT"):
        tomepass.apply(vit, AdaViT(4, policy=policy), example_inputs=images)
    wide = make_vit(hidden_size=64)
    with pytest.raises(TomeError, match="do not fit tokens of width 64"):
        tomepass.apply(wide, trained(), example_inputs=images)


@every_kind
def test_bad_fields_are_refused_by_name(kind: type[Learned]) -> None:
    with pytest.raises(TypeError, match="policy"):
        kind(policy="weights.pt")
    with pytest.raises(ValueError, match=f"prop_attn=True does nothing with {kind.__name__}"):
        kind(prop_attn=True)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"epochs": 0}, ValueError, "epochs"),
        ({"epochs": 1.5}, TypeError, "epochs"),
        ({"learning_rate": 0}, ValueError, "learning_rate"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate"),
        ({"seed": -1}, ValueError, "seed"),
        ({"labels": "yes"}, TypeError, "labels"),
        ({"labels": True}, TypeError, "pair of inputs and a tensor of labels"),
        ({"method": Prune(4)}, TypeError, "DynamicViT"),
        ({"model": "vit"}, TypeError, "torch.nn.Module"),
        ({"batches": []}, ValueError, "batches"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: Any, error: Any, told: str, vit: Any) -> None:
    arguments: Any = {"model": vit, "method": DynamicViT(4), "batches": batches()} | options
    with pytest.raises(error, match=told):
        train_policy(**arguments, progress=False)


@pytest.mark.deep
def test_what_cannot_be_trained_is_refused(vit: Any, images: Tensor) -> None:
    def refused(told: str, model: Any = vit, given: Any = None, method: Any = None) -> None:
        chosen = DynamicViT(keep_rate=0.5) if method is None else method
        with pytest.raises((TomeError, ValueError), match=told):
            train_policy(model, chosen, given or [images], epochs=2, progress=False)

    refused("training mode", make_model("vit").train())
    refused("applied already", tomepass.apply(vit, r=2, example_inputs=images))
    refused("attention written out", make_vit(attn_implementation="eager"))
    refused("ran out", given=iter([images, images]))
    refused("other inputs", given=[images, torch.randn(2, 3, 64, 64)])
    refused("got 0", method=DynamicViT(0))
    refused("cannot be merged", torch.nn.Linear(32, 3).eval())
    refused("padding mask", make_model("bert_padded"), [make_inputs("bert_padded", 3)])
    refused("neither logits", torch.nn.Sequential(vit, _Mean()).eval())


class _Mean(torch.nn.Module):
    def forward(self, outputs: Any) -> Tensor:
        return outputs.logits.mean()


# ---- what is learned ---------------------------------------------------------------------------


@pytest.mark.deep
@one_kind
def test_a_short_training_beats_random_pruning_on_digits(kind: type[Learned]) -> None:
    """One patch of 64 is left beside the class token: a policy finds one that tells."""
    model, (pixels, _) = digits.load_model(), digits.load_images()
    seen, held = list(pixels[:180].split(9)), pixels[180:]  # no labels
    counts = [0, 63]
    options: dict[str, Any] = {"epochs": 5, "learning_rate": 3e-3, "progress": False}
    learned = divergence(model, train_policy(model, kind(counts), seen, **options), held)
    random = [divergence(model, Prune(counts, score="random", seed=s), held) for s in range(5)]
    assert learned < 0.75 * sum(random) / len(random)


@torch.no_grad()
def divergence(model: Any, method: Any, pixels: Tensor) -> float:
    merged = tomepass.apply(model, method, example_inputs=pixels[:2])
    ours, whole = (m(pixels).logits.log_softmax(-1) for m in (merged, model))
    return float(F.kl_div(ours, whole, log_target=True, reduction="batchmean"))
