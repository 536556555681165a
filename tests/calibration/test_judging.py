"""How far a reduced model is from the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import make_inputs

import tomepass
from tomepass import Prune, ToMe, TomeError
from tomepass.calibration.judging import Judge


@pytest.fixture
def batches() -> list[Any]:
    return list(make_inputs("vit", 10)["pixel_values"].split(4))


@torch.no_grad()
def test_divergence_agreement_and_top1_are_worked_out_image_by_image(
    batches: list[Any], shared_models: Any
) -> None:
    model = shared_models["vit"]
    labels = torch.arange(10) % 3
    judge = Judge(model, batches, labels)
    assert (judge.images, judge.depth, judge.classifies) == (10, 3, True)
    reduced = tomepass.apply(model, ToMe(12), example_inputs=batches[0])
    pixels = torch.cat(batches)
    p, q = (m(pixels).logits.double().softmax(-1) for m in (model, reduced))
    kl = (p * (p / q).log()).sum(-1)
    outputs = judge.outputs(ToMe(12))
    torch.testing.assert_close(outputs.divergence, kl, rtol=1e-3, atol=1e-6)
    score = outputs.score([1, 4])
    assert score.divergence == pytest.approx(float(kl[[1, 4]].mean()), rel=1e-3)
    assert score.images == 2
    whole = judge.score(ToMe(12))
    assert whole.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert whole.top1 == pytest.approx(float((q.argmax(-1) == labels).float().mean()))
    assert judge.score(ToMe(0)).divergence == pytest.approx(0.0, abs=1e-9)


def test_the_share_of_macs_is_the_report_s(batches: list[Any], shared_models: Any) -> None:
    model = shared_models["vit"]
    judge = Judge(model, batches)
    for method in (ToMe(9), ToMe([4, 0, 20]), Prune(30), Prune(keep_rate=0.5)):
        report = tomepass.explain(model, method, example_inputs=batches[0])
        assert judge.share(method) == pytest.approx(report.macs / report.macs_original)


@torch.no_grad()
def test_a_model_without_logits_is_judged_by_its_features(shared_models: Any) -> None:
    model, inputs = shared_models["siglip_vision"], make_inputs("siglip_vision", 4)
    judge = Judge(model, [inputs])
    score = judge.score(ToMe(9))
    assert score.agreement is None
    assert score.divergence > 0
    assert judge.score(ToMe(0)).divergence == 0


def test_what_cannot_be_judged_is_refused(batches: list[Any], vit: Any) -> None:
    with pytest.raises(TomeError, match="there are no images"):
        Judge(vit, [])
    with pytest.raises(TomeError, match="eval mode"):
        Judge(vit.train(), batches)
