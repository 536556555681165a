"""Calibration finds gentler schedules, the same each time, without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import make_inputs, make_vit

import tomepass
from tomepass import DiffRate, Plan, Prune, ToFu, ToMe, TomeBackend, TomeError
from tomepass.calibration import fastest as plans
from tomepass.calibration import searching as calibration
from tomepass.calibration.linearity import block_linearity
from tomepass.capture.exported import capture_module
from tomepass.methods import method_from_dict
from tomepass.planning.plan_graph import plan_graph

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_vit()


@pytest.fixture(scope="module")
def batches() -> list[Any]:
    return list(make_inputs("vit", 8)["pixel_values"].split(4))


@pytest.fixture(scope="module")
def plan(model: Any, batches: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    cache = tmp_path_factory.mktemp("calibration") / "cache.json"
    return tomepass.calibrate(model, batches, macs=0.6, cache=cache, progress=False)


def test_the_plan_keeps_its_goal_and_beats_even_counts_where_it_was_tuned(plan: Plan) -> None:
    found = plan.calibration
    assert found is not None
    assert 0.59 < found.macs <= 0.6
    assert found.tuned.divergence == min(t.divergence for t in found.tried)
    assert (found.tuned.images, found.held_out.images) == (6, 2)
    assert all(0.59 < t.macs <= 0.6 for t in found.tried)
    even = [t for t in found.tried if t.method.schedule.values == _even_counts(plan)]
    assert all(found.tuned.divergence <= t.divergence for t in even)
    assert plan.speedup is None


def _even_counts(plan: Plan) -> tuple[int, ...]:
    counts = plan.method.schedule.values
    return (counts[0],) * len(counts)  # type: ignore[return-value]


def test_profile_and_sensitivity_have_a_figure_a_block(plan: Plan, tmp_path: Path) -> None:
    found = plan.calibration
    assert found is not None
    depth = len(plan.method.schedule.values)
    assert len(found.linearity) == len(found.sensitivity) == depth
    assert all(bent > 0 for bent in found.linearity)
    assert all(s >= 0 for s in found.sensitivity)
    found.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 10_000


TUNED = torch.randperm(8, generator=torch.Generator().manual_seed(0))[2:]
"""Of eight images with seed 0, all but the quarter held out."""


@pytest.mark.parametrize("block", [0, pytest.param(1, marks=pytest.mark.doors)])
@torch.no_grad()
def test_sensitivity_is_the_divergence_when_that_block_alone_loses_tokens(
    block: int, pruned: tuple[Plan, str], model: Any, batches: list[Any]
) -> None:
    found = pruned[0].calibration
    assert found is not None
    counts = [found.alone if i == block else 0 for i in range(3)]
    images = torch.cat(batches)[TUNED]
    merged = tomepass.apply(model, Prune(counts), example_inputs=images)
    before, after = (m(images).logits.double().softmax(-1) for m in (model, merged))
    divergence = (before * (before / after).log()).sum(-1).mean()
    assert found.sensitivity[block] == pytest.approx(float(divergence), rel=1e-3)


def test_it_prints_saves_and_is_taken_by_every_door(
    plan: Plan, model: Any, batches: list[Any], tmp_path: Path
) -> None:
    text = str(plan)
    assert "held out" in text
    assert "not linear" in text
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    merged = tomepass.apply(model, plan)
    assert merged.method == plan.method
    assert tomepass.explain(model, again).method == plan.method
    assert TomeBackend(plan) == TomeBackend(plan.method)
    assert hash(TomeBackend(plan)) == hash(TomeBackend(plan.method))


@pytest.mark.deep  # that a cache is read is seen where a run goes on, below
@pytest.mark.parametrize("methods", ["pruning", "all"])
def test_the_same_seed_finds_the_same_and_a_cache_measures_nothing_again(
    methods: str,
    request: pytest.FixtureRequest,
    model: Any,
    batches: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache.json"
    goal: dict[str, Any] = {"macs": 0.6, "cache": cache, "progress": False}
    if methods == "all":
        plan = request.getfixturevalue("plan")
    else:
        plan, _ = request.getfixturevalue("pruned")
        goal |= {"macs": 0.8, "methods": Prune()}
    first = tomepass.calibrate(model, batches, **goal)
    assert first == plan
    monkeypatch.setattr(calibration, "block_linearity", _not_again)
    monkeypatch.setattr(calibration.Judge, "outputs", _not_again)
    assert tomepass.calibrate(model, batches, **goal) == plan
    with pytest.raises(AssertionError, match="again"):
        tomepass.calibrate(model, batches, **{**goal, "macs": 0.7})


@pytest.fixture(scope="module")
def pruned(
    model: Any, batches: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, str]:
    """A plan that takes few candidates to find, and the cache that it leaves."""
    cache = tmp_path_factory.mktemp("pruned") / "cache.json"
    options: dict[str, Any] = {"cache": cache, "progress": False}
    plan = tomepass.calibrate(model, batches, macs=0.8, methods=Prune(), **options)
    return plan, cache.read_text()


def _not_again(*_: Any, **__: Any) -> None:
    raise AssertionError("measured again")


@pytest.mark.parametrize(
    "writing",
    [pytest.param(False, marks=pytest.mark.doors), pytest.param(True, marks=pytest.mark.deep)],
)
def test_a_run_broken_off_goes_on_and_measures_nothing_twice(
    writing: bool, pruned: tuple[Plan, str], model: Any, batches: list[Any], tmp_path: Path
) -> None:
    goal: dict[str, Any] = {"macs": 0.8, "methods": Prune(), "progress": False}
    cache, seen = tmp_path / "cache.json", []
    outputs, write = calibration.Judge.outputs, Path.write_text

    def measured(judge: Any, method: Any) -> Any:
        if len(seen) == 5 and not writing:
            raise KeyboardInterrupt
        seen.append(method)
        return outputs(judge, method)

    def half_written(path: Path, text: str) -> int:
        if len(seen) == 5:
            write(path, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration.Judge, "outputs", measured)
        if writing:
            patch.setattr(Path, "write_text", half_written)
        with pytest.raises(KeyboardInterrupt):
            tomepass.calibrate(model, batches, cache=cache, **goal)
    before = seen[:4] if writing else seen[:]  # what was being written is lost, and no more
    seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration.Judge, "outputs", lambda *a: seen.append(a[1]) or outputs(*a))
        patch.setattr(calibration, "block_linearity", _not_again)
        again = tomepass.calibrate(model, batches, cache=cache, **goal)
    assert again == pruned[0]
    assert len(before) >= 4
    assert len(set(before + seen)) == len(before + seen)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


@pytest.mark.parametrize("text", ['{"outputs": "a", "kno', "[]", '{"outputs": "a"}'])
def test_a_broken_cache_is_refused(
    text: str, model: Any, batches: list[Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(text)
    with pytest.raises(TomeError, match=r"cache\.json cannot be read(.|\n)*remove it"):
        tomepass.calibrate(model, batches, macs=0.6, cache=cache, progress=False)


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_shown_where_it_is_asked_for(
    shown: bool,
    pruned: tuple[Plan, str],
    model: Any,
    batches: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws bars on terminals
    monkeypatch.setenv("COLUMNS", "200")
    seen: list[Any] = []
    make = calibration.progress_bar
    monkeypatch.setattr(calibration, "progress_bar", lambda s: seen.append(make(s)) or seen[-1])
    cache = tmp_path / "cache.json"
    cache.write_text(pruned[1])
    goal: dict[str, Any] = {"macs": 0.8, "methods": Prune(), "cache": cache}
    tomepass.calibrate(model, batches, progress=shown, **goal)
    told = capsys.readouterr().err
    assert ("one block alone" in told) == shown
    assert ("tried, now Prune(" in told) == shown
    assert [(task.completed, task.total) for task in seen[0].tasks] == [(0, None), (3, 3)]


def test_a_cache_of_other_images_is_refused(model: Any, batches: list[Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(json.dumps({"outputs": "others", "known": {}}))
    with pytest.raises(TomeError, match="another model or other images"):
        tomepass.calibrate(model, batches, macs=0.6, cache=cache, progress=False)


@pytest.mark.deep
def test_tofu_s_strategies_follow_the_measured_profile(model: Any, batches: list[Any]) -> None:
    plan = tomepass.calibrate(model, batches, macs=0.7, methods=ToFu(), progress=False)
    found = plan.calibration
    assert found is not None
    order = sorted(range(len(found.linearity)), key=lambda i: -found.linearity[i])
    assert found.tried
    for method in (t.method for t in found.tried):
        assert method.strategies != "halves"
        pruning = {i for i, s in enumerate(method.strategies) if s == "prune"}
        assert pruning == set(order[: len(pruning)])


@pytest.mark.doors
def test_diffrate_searches_its_shares(batches: list[Any]) -> None:
    model = make_vit(num_hidden_layers=2)
    plan = tomepass.calibrate(model, batches, macs=0.7, methods=[DiffRate()], progress=False)
    assert plan.calibration is not None
    tried = {t.method.pruned for t in plan.calibration.tried}
    assert tried >= {0.0, 0.25, 0.5, 0.75}
    depth = len(plan.method.schedule.values)
    by_block = [shares for shares in tried if isinstance(shares, tuple)]
    assert len(by_block) > 6
    assert {len(shares) for shares in by_block} == {depth}
    assert method_from_dict(plan.method.to_dict()) == plan.method


class Squares(torch.nn.Module):
    """Attention whose MLP is linear in one block and a square in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(2))
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(8, 24) for _ in range(2))
        self.embed = torch.nn.Linear(4, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for index, (norm, qkv) in enumerate(zip(self.norms, self.qkv, strict=True)):
            q, k, v = qkv(norm(x))[:, None].chunk(3, dim=-1)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
            x = x + (0.5 * x if index == 0 else x.square())
        return self.head(x.mean(1))


def test_a_linear_block_measures_0_and_a_square_one_does_not() -> None:
    torch.manual_seed(0)
    model, x = Squares().eval(), torch.randn(2, 12, 4)
    capture = capture_module(model, {"x": x})
    (stream,) = plan_graph(capture.graph, ToMe(0)).streams
    first, second = block_linearity(model, capture, stream, {"x": x})
    assert first < 1e-5
    assert second > 1e-2


@pytest.mark.parametrize(
    ("goal", "kind", "said"),
    [
        ({}, TypeError, "give the goal"),
        ({"macs": 0.6, "speedup": 1.5}, TypeError, "give one of"),
        ({"macs": 1.5}, ValueError, "above 0 and at most 1"),
        ({"macs": 0.6, "held_out": 1.0}, ValueError, "held_out"),
        ({"macs": 0.6, "methods": ["tome"]}, TypeError, "methods must be"),
        ({"macs": 0.02}, TomeError, "macs=0.02 cannot be reached"),
        ({"macs": 0.6, "inner": "eager"}, ValueError, "inner= and macs=0.6 make no sense"),
        ({"macs": 0.6, "inner_options": {"freezing": True}}, ValueError, "inner_options= and macs"),
        ({"macs": 0.6, "methods": ToMe(8)}, ValueError, r"counts of ToMe\(r=8\) and the goal"),
        ({"macs": 0.6, "methods": ToFu(macs=0.7)}, ValueError, r"ToFu\(macs=0.7.*\) and the goal"),
        ({"macs": 0.6, "methods": ToMe(blocks=(1,))}, ValueError, "blocks= of .* and the goal"),
        ({"macs": 0.6, "methods": ToMe(adaptive=True)}, TomeError, "adaptive=True .* calibrate"),
    ],
)
def test_wrong_goals_are_refused(
    model: Any, batches: list[Any], goal: Any, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        tomepass.calibrate(model, batches, progress=False, **goal)


def test_too_few_images_are_refused(model: Any, batches: list[Any]) -> None:
    with pytest.raises(TomeError, match="3 images are too few"):
        tomepass.calibrate(model, [batches[0][:3]], macs=0.6, progress=False)


@pytest.mark.deep
def test_a_speedup_is_measured_and_what_is_missed_is_said(
    model: Any, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(_: Any, __: Any, method: Any, **options: Any) -> Any:
        asked.append(method)
        ratio = type("Ratio", (), {"median": 1.1 + 0.1 * len(asked)})
        return type("Measured", (), {"ratio": ratio})

    monkeypatch.setattr(calibration, "measure", measured)
    plan = tomepass.calibrate(model, batches, speedup=1.25, methods=ToFu(), progress=False)
    assert plan.speedup == pytest.approx(1.3)
    assert len(asked) == 2
    assert plan.why.startswith("1.30x measured")


@pytest.mark.deep
def test_a_speedup_is_measured_by_the_backend_that_was_asked_for_and_kept(
    model: Any, batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_ATTEMPTS", 1)
    cache = tmp_path / "cache.json"
    goal: dict[str, Any] = {"speedup": 1.1, "methods": Prune(), "cache": cache, "progress": False}
    plan = tomepass.calibrate(model, batches, inner="eager", **goal)
    found = plan.calibration
    assert found is not None
    assert found.macs <= 1 / 1.1
    assert plan.inner == "eager"
    assert plan.speedup is not None
    assert plan.why.startswith(f"{plan.speedup:.2f}x measured; ")
    assert ("1.1x was asked for and not reached" in plan.why) == (plan.speedup < 1.1)
    assert Plan.from_json(plan.to_json()) == plan
    monkeypatch.setattr(calibration, "measure", _not_again)
    assert tomepass.calibrate(model, batches, inner="eager", **goal) == plan
    for other in ({"inner": "aot_eager"}, {"inner": "eager", "inner_options": {"some": 1}}):
        with pytest.raises(AssertionError, match="again"):
            tomepass.calibrate(model, batches, **goal, **other)


@pytest.mark.deep
@pytest.mark.parametrize(
    "name",
    ["siglip_vision", *(pytest.param(n, marks=pytest.mark.doors) for n in ("dinov2", "ast"))],
)
@torch.no_grad()
def test_it_calibrates_models_of_other_families(
    name: str, shared_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The walk from shape to shape is the same for all, and slow: three shapes are tried.
    monkeypatch.setattr(calibration._Search, "_walked", lambda _, __, shape, ___: shape)
    model, inputs = shared_models[name], make_inputs(name, 4)
    plan = tomepass.calibrate(model, [inputs], macs=0.9, methods=Prune(), progress=False)
    found = plan.calibration
    assert found is not None
    assert 0.85 < found.macs <= 0.9
    merged = tomepass.apply(model, plan, example_inputs=inputs)
    before, after = model(**inputs), merged(**inputs)
    (held,) = torch.randperm(4, generator=torch.Generator().manual_seed(0))[:1].tolist()
    if name != "siglip_vision":
        before, after = (o.logits.double().softmax(-1)[held] for o in (before, after))
        expected = (before * (before / after).log()).sum()
    else:
        before, after = (o.last_hidden_state.double() for o in (before, after))
        expected = (after - before)[held].square().mean() / before.square().mean()
    assert found.held_out.divergence == pytest.approx(float(expected), rel=1e-3)
    assert (found.held_out.agreement is None) == (name == "siglip_vision")
    assert found.tuned.divergence == min(t.divergence for t in found.tried)
