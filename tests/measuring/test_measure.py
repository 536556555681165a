"""Benchmarks, their plots and their command line. No test here looks at how long a thing took."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import matplotlib
import pytest
import torch
import torch._inductor.config as inductor
import typer
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner
from zoo import make_inputs, make_model

import tomepass
from benchmarks.cpu import throughput
from tomepass import ToMe, TomeError
from tomepass.cli.options import MultiValueCommand, parse_r, spread_values
from tomepass.measuring import measure as benchmarking
from tomepass.measuring.environment import describe, environment
from tomepass.measuring.measure import measure, steps
from tomepass.measuring.memory import peak_tensor_bytes
from tomepass.measuring.speed_plot import speed_plot
from tomepass.measuring.table import bench_table
from tomepass.measuring.values import Arm, Measurement, Settings, Spread, from_json, to_json
from tomepass.printing.plots import accuracy_plot
from tomepass.printing.style import to_text

BATCH, ROUNDS = 3, 4


@pytest.fixture
def vit() -> Any:
    """One block on 16 patches, where the shared one has three on 64: it compiles sooner."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture
def images() -> Tensor:
    """Two images for it: ``[2, 3, 16, 16]``."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured() -> tuple[Measurement, list[str]]:
    """One real measurement, and what its progress said."""
    said: list[str] = []
    model, inputs = make_model("vit"), make_inputs("vit", batch=BATCH)
    found = measure(
        model, inputs, ToMe(r=8), inner="aot_eager", rounds=ROUNDS, progress=said.append
    )
    return found, said


def made_up(r: Any = 8, options: dict[str, Any] | None = None, ratio: float = 1.25) -> Measurement:
    """A measurement with figures that are easy to recognise."""
    settings = Settings(
        model="vit_base",
        method=ToMe(r),
        dtype="bfloat16",
        batch=16,
        inner="inductor",
        inner_options=tuple(sorted((options or {}).items())),
        device="cpu",
        threads=2,
        rounds=3,
        calls=1,
        cold=True,
    )
    original = Arm(Spread((40.0, 39.0, 44.0)), 210_000_000, 13.0)
    merged = Arm(Spread((32.0, 31.0, 33.0)), 180_000_000, 41.0)
    return Measurement(
        settings, original, merged, Spread((ratio, ratio - 0.05, ratio + 0.1)), 1.34, 2.5
    )


# ---- measure -------------------------------------------------------------------------------


def test_a_measurement_says_what_was_measured(measured: tuple[Measurement, list[str]]) -> None:
    settings = measured[0].settings
    assert settings.model == "ViTForImageClassification"
    assert settings.method == ToMe(r=8)
    assert (settings.dtype, settings.device, settings.batch) == ("float32", "cpu", BATCH)
    assert (settings.inner, settings.inner_options) == ("aot_eager", ())
    assert settings.threads == torch.get_num_threads()
    assert settings.rounds == ROUNDS
    assert settings.calls >= 1
    assert not settings.cold


def test_every_round_gives_a_sample_and_a_ratio(measured: tuple[Measurement, list[str]]) -> None:
    found = measured[0]
    original, merged = found.original.milliseconds.samples, found.merged.milliseconds.samples
    assert len(original) == len(merged) == len(found.ratio.samples) == ROUNDS
    pairs = [a / b for a, b in zip(original, merged, strict=True)]
    assert found.ratio.samples == pytest.approx(pairs)
    assert min(original + merged) > 0
    assert found.original.compile_seconds > 0
    assert found.merged.compile_seconds > 0
    assert found.apply_seconds > 0


def test_the_ideal_ratio_is_the_reports(measured: tuple[Measurement, list[str]]) -> None:
    report = tomepass.explain(make_model("vit"), r=8)
    assert measured[0].ratio_ideal == report.speedup_ideal > 1


def test_progress_is_told_as_often_as_promised(measured: tuple[Measurement, list[str]]) -> None:
    assert len(measured[1]) == steps(ROUNDS)
    assert measured[1][-1] == f"round {ROUNDS} of {ROUNDS}"


def test_milliseconds_are_an_images(
    monkeypatch: pytest.MonkeyPatch, vit: Any, images: Tensor
) -> None:
    monkeypatch.setattr(benchmarking, "seconds_a_call", lambda run, calls, device: 0.6)
    found = measure(vit, images.repeat(2, 1, 1, 1)[:3], r=4, inner="eager", rounds=1)
    assert found.original.milliseconds.samples == pytest.approx((200.0,))
    assert found.original.images_per_second == pytest.approx(5.0)
    assert found.ratio.samples == (1.0,)


def test_rounds_are_interleaved_and_swap_their_order(
    monkeypatch: pytest.MonkeyPatch, vit: Any, images: Tensor
) -> None:
    monkeypatch.setattr(benchmarking, "_SAMPLE_SECONDS", 0.0)
    order: list[bool] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        merged = any("tome" in str(node.target) for node in gm.graph.nodes)

        def run(*values: Any) -> Any:
            order.append(merged)
            return gm(*values)

        return run

    found = measure(vit, images, r=4, inner=compiler, rounds=3)
    assert found.settings.inner == "compiler"
    assert found.settings.calls == 1
    a, b = False, True
    assert order[:2] == [a, b]  # compiled in this order
    assert order[-6:] == [a, b, b, a, a, b]


@pytest.mark.deep
def test_measuring_starts_from_a_dynamo_without_history(vit: Any, images: Tensor) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for r in (2, 4):
            measure(vit, images, r=r, inner="eager", rounds=1)


@pytest.mark.deep
def test_a_model_that_keeps_recompiling_is_not_timed(vit: Any, images: Tensor) -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.calls, self.word = vit, 0, ""

        def forward(self, pixel_values: Tensor) -> Any:
            logits = self.vit(pixel_values).logits
            # Not where it is exported to be merged (`is_exporting` is true in both at torch 2.11).
            if not torch.compiler.is_dynamo_compiling():
                return logits
            self.calls += 1
            self.word = f"call {self.calls}"
            return logits * len(self.word)

    with pytest.raises(RuntimeError, match="recompile"):
        measure(Restless().eval(), images, r=4, inner="eager", rounds=1)


def test_an_applied_model_is_measured_against_its_original(vit: Any, images: Tensor) -> None:
    merged = tomepass.apply(vit, ToMe(r=4, prop_attn=False))
    found = measure(merged, images, inner="eager", rounds=1, label="a name")
    assert found.settings.method == ToMe(r=4, prop_attn=False)
    assert found.settings.model == "a name"


def test_bad_requests_are_refused_before_any_work(vit: Any, images: Tensor) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        measure(vit, images, r=8, rounds=0, progress=said.append)
    with pytest.raises(TomeError, match="no option 'freezzing'"):
        measure(vit, images, r=4, inner_options={"freezzing": True}, progress=said.append)
    with pytest.raises(TomeError, match="knows no backend 'inductr'"):
        measure(vit, images, r=4, inner="inductr", progress=said.append)
    with pytest.raises(TomeError, match="training mode"):
        measure(vit.train(), images, r=8, progress=said.append)
    with pytest.raises(TomeError, match="on \\['meta'\\]"):
        measure(vit.eval().to("meta"), images, r=8, progress=said.append)
    assert not said


def test_a_model_that_cannot_be_merged_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(TomeError, match="cannot be merged"):
        measure(model, torch.randn(2, 4), r=8, inner="eager")


# ---- freezing ------------------------------------------------------------------------------


@pytest.mark.parametrize("freezing", [True, False])
def test_freezing_reaches_dynamo_and_inductor(
    monkeypatch: pytest.MonkeyPatch, vit: Any, images: Tensor, freezing: bool
) -> None:
    seen = []

    def compile_fx(gm: torch.fx.GraphModule, inputs: Any, config_patches: Any = None) -> Any:
        inputs_of_graph = len(gm.graph.find_nodes(op="placeholder"))
        seen.append((config_patches, inductor.freezing, inputs_of_graph == 1))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    found = measure(vit, images, r=4, inner_options={"freezing": freezing}, rounds=1)
    # Frozen parameters are constants of the graph: the images are its one input.
    assert seen == [({"freezing": freezing}, freezing, freezing)] * 2
    assert found.settings.options_label == ("freezing" if freezing else "no freezing")


@pytest.mark.usefixtures("inductor")
def test_nothing_outside_is_changed(vit: Any, images: Tensor) -> None:
    """Inductor, frozen, from empty caches: what touches the most."""

    def state() -> list[Any]:
        return [
            inductor.get_config_copy(),
            torch._dynamo.config.get_config_copy(),
            {k: v for k, v in os.environ.items() if k.endswith("_CACHE_DIR")},
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
            [sorted(p.__dict__) for p in (*vit.parameters(), *vit.buffers())],
            [p.tolist() for p in vit.parameters()],
        ]

    before = state()
    found = measure(vit, images, r=4, inner_options={"freezing": True}, rounds=1, cold=True)
    assert found.settings.cold
    for was, now in zip(before, state(), strict=True):
        assert was == now


# ---- memory --------------------------------------------------------------------------------


def test_peak_memory_of_a_hand_made_example() -> None:
    held = torch.empty(1 << 20)  # made before: not counted

    def run() -> Tensor:
        first = torch.empty(1000, dtype=torch.float32)  # 4000 bytes
        second = torch.empty(500, dtype=torch.float32)  # 6000 held
        del first  # 2000
        third = torch.empty(900, dtype=torch.float64)  # 9200: the peak
        del third  # 2000
        held.add_(1.0)  # in place: nothing new
        return torch.cat([second, second])  # 6000

    assert peak_tensor_bytes(run) == 9200


def test_peak_memory_includes_the_result() -> None:
    assert peak_tensor_bytes(lambda: torch.empty(1000, dtype=torch.int8)) == 1000
    assert peak_tensor_bytes(lambda: None) == 0


def test_measuring_memory_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    peak_tensor_bytes(lambda: torch.empty(10))
    assert capfd.readouterr() == ("", "")


def test_peak_memory_is_measured_for_both(vit: Any, images: Tensor) -> None:
    found = measure(vit, images, r=4, inner="eager", rounds=1)
    with torch.no_grad():
        compiled = torch.compile(vit, backend="eager")
        compiled(images)
        assert found.original.peak_bytes == peak_tensor_bytes(lambda: compiled(images))
    assert found.memory_ratio == found.original.peak_bytes / found.merged.peak_bytes


# ---- figures -------------------------------------------------------------------------------


def test_a_spread_reads_off_its_samples() -> None:
    spread = Spread((4.0, 1.0, 3.0, 2.0))
    assert (spread.low, spread.median, spread.high) == (1.0, 2.5, 4.0)
    assert (spread.quantile(0.25), spread.quantile(0.75)) == (1.75, 3.25)
    assert Spread((5.0,)).quantile(0.25) == 5.0


def test_json_there_and_back(measured: tuple[Measurement, list[str]]) -> None:
    all_of_them = [measured[0], made_up((13, -1), {"freezing": True}), made_up([13, 0])]
    where = environment()
    text = to_json(all_of_them, where)
    assert from_json(text) == (all_of_them, where)
    first = json.loads(text)["measurements"][0]
    assert first["ratio"]["median"] == measured[0].ratio.median
    assert set(first["merged"]) == {
        "milliseconds", "images_per_second", "peak_bytes", "compile_seconds"
    }  # fmt: skip


def test_the_environment_names_versions_and_no_host() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["tomepass"] == tomepass.__version__
    assert {"transformers", "python", "cpu", "threads"} <= set(found)
    text = json.dumps(found)
    assert str(Path.cwd()) not in text
    assert platform.node() not in text.split('"')


def test_the_table_shows_every_figure() -> None:
    where = {"torch": "2.13.0", "cpu": "A CPU", "cpu_capability": "AVX512", "threads": 2}
    text = to_text(bench_table([made_up(8), made_up((13, -1), {"freezing": True})], where), 80)
    plain, frozen = (line.split() for line in text.splitlines() if "->" in line and "x" in line)
    assert " ".join(plain) == "8 25.0 -> 31.2 1.25x (1.20-1.35) 1.34x 210 -> 180 13 -> 41"
    assert " ".join(frozen).startswith("(13, -1.0) 25.0 -> 31.2")
    assert "vit_base, bfloat16, batch 16, inductor, cpu, 2 threads" in text
    assert "inductor (freezing), cpu" in text
    assert "torch 2.13.0, A CPU (AVX512), 2 threads" in text
    assert describe(where | {"threads": 1}).endswith("1 thread")


def test_labels_are_short_where_they_can_be() -> None:
    assert made_up(8).settings.method_label == "8"
    assert made_up([4, 2]).settings.method_label == "[4, 2]"
    other = Settings.from_dict(
        made_up().settings.to_dict() | {"method": ToMe(8, prop_attn=False).to_dict()}
    )
    assert other.method_label == "ToMe(r=8, prop_attn=False)"
    options = made_up(options={"freezing": False, "max_autotune": True, "shape_padding": 2})
    assert options.settings.options_label == "no freezing, max_autotune, shape_padding=2"


# ---- plots ---------------------------------------------------------------------------------


def assert_plot(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 1000 <= image.width <= 1600
        assert 500 <= image.height <= 1000
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 20  # not a blank page


def test_the_speed_plot_is_a_picture(tmp_path: Path) -> None:
    settings_before = dict(matplotlib.rcParams)
    several = [made_up(r, {"freezing": f}) for f in (False, True) for r in (8, 13, (13, -1))]
    speed_plot(several, tmp_path / "several.png", environment())
    speed_plot([made_up()], tmp_path / "one.png")
    assert_plot(tmp_path / "several.png")
    assert_plot(tmp_path / "one.png")
    assert dict(matplotlib.rcParams) == settings_before


def test_one_plot_shows_one_setting(tmp_path: Path) -> None:
    other = made_up().to_dict()
    other["settings"]["batch"] = 1
    with pytest.raises(ValueError, match=r"batch 1, .* and .*batch 16"):
        speed_plot([made_up(), Measurement.from_dict(other)], tmp_path / "x.png")
    with pytest.raises(ValueError, match="no measurements"):
        speed_plot([], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_the_accuracy_plot_takes_objects_and_dicts(tmp_path: Path) -> None:
    rows = [
        {"r": 0, "accuracy": 97.8, "images_per_second": 1200.0},
        {"r": 4, "accuracy": 96.9, "images_per_second": 1610.0},
    ]
    accuracy_plot(rows, tmp_path / "dicts.png", "A title")
    accuracy_plot([SimpleNamespace(**row) for row in rows], str(tmp_path / "objects.png"))
    assert_plot(tmp_path / "dicts.png")
    assert_plot(tmp_path / "objects.png")


def test_without_labels_agreement_is_plotted(tmp_path: Path) -> None:
    rows = [
        {"r": r, "accuracy": None, "agreement": 100.0 - r, "images_per_second": 900.0 + r}
        for r in (0, 4, 8)
    ]
    accuracy_plot(rows, tmp_path / "agreement.png")
    assert_plot(tmp_path / "agreement.png")
    with pytest.raises(ValueError, match="no rows"):
        accuracy_plot([], tmp_path / "x.png")


# ---- the command ---------------------------------------------------------------------------


def test_throughput_measures_a_local_model(vit: Any, tmp_path: Path) -> None:
    vit.save_pretrained(tmp_path / "tiny")
    out = tmp_path / "results"
    words = ["--model", str(tmp_path / "tiny"), "--r", "2", "4", "--batch", "2", "--dtype", "fp32"]
    result = CliRunner().invoke(
        throughput.app, [*words, "--backend", "eager", "--rounds", "2", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    found, _ = from_json((out / "throughput.json").read_text())
    assert [m.settings.method for m in found] == [ToMe(r=2), ToMe(r=4)]
    assert {(m.settings.model, m.settings.batch) for m in found} == {("tiny", 2)}
    assert "tiny, float32, batch 2, eager" in result.output
    assert_plot(out / "throughput.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vit_huge"], "no model 'vit_huge'"),
        (["--r", "8", "x"], "got 'x'"),
        (["--r", "-1"], "got -1"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--backend", "eager", "--both"], "freezing is an option of inductor"),
    ],
)
def test_throughput_says_what_is_wrong(words: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(throughput.app, [*words, "--out", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "none").exists()


def test_freezing_is_measured_off_on_or_both() -> None:
    assert throughput.option_sets("inductor", False, False) == [{"freezing": False}]
    assert throughput.option_sets("inductor", True, False) == [{"freezing": True}]
    assert throughput.option_sets("inductor", False, True) == [
        {"freezing": False}, {"freezing": True}
    ]  # fmt: skip
    assert throughput.option_sets("openvino", False, False) == [{}]


def test_named_models_are_the_usual_ones_and_seeded() -> None:
    model = throughput.make_model("vit_tiny")
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 5_717_416  # DeiT-Ti's
    again = throughput.make_model("vit_tiny")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


# ---- several values after one option -------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--r 8 13 16", "--r 8 --r 13 --r 16"),
        ("--r 8 --r 13", "--r 8 --r 13"),
        ("--r 8 13 --batch 4 --r 16", "--r 8 --r 13 --batch 4 --r 16"),
        ("--r=8 13", "--r=8 --r 13"),
        ("--r 8 -1", "--r 8 --r -1"),
        ("--r -1 -.5", "--r -1 --r -.5"),
        ("--batch 4 5", "--batch 4 5"),
        ("--r 8 -- --r 9 10", "--r 8 -- --r 9 10"),
        ("--r", "--r"),
        ("", ""),
    ],
)
def test_values_are_spread(line: str, expected: str) -> None:
    assert spread_values(line.split(), {"--r"}) == expected.split()


def test_a_command_takes_several_values() -> None:
    app = typer.Typer()

    @app.command(cls=MultiValueCommand)
    def main(
        r: Annotated[list[int] | None, typer.Option("--r", "-r")] = None,
        batch: int = 1,
        fast: bool = False,
    ) -> None:
        typer.echo(f"{list(r or [])} {batch} {fast}")

    def said(line: str) -> str:
        return CliRunner().invoke(app, line.split()).output.strip()

    assert said("--r 8 13 16 --batch 4 --fast") == "[8, 13, 16] 4 True"
    assert said("-r 8 13 --no-fast --r -1") == "[8, 13, -1] 1 False"
    assert said("") == "[] 1 False"
    assert CliRunner().invoke(app, ["--batch", "1", "2"]).exit_code == 2
    assert CliRunner().invoke(app, ["--r"]).exit_code == 2


@pytest.mark.parametrize(
    ("text", "r"),
    [
        ("16", 16),
        (" 16 ", 16),
        ("16,16,8", [16, 16, 8]),
        ("[16, 0]", [16, 0]),
        ("[16]", [16]),
        ("(13,-1)", (13, -1)),
        ("(13, 0.5)", (13, 0.5)),
    ],
)
def test_r_is_read_as_it_is_written_in_python(text: str, r: Any) -> None:
    assert ToMe(parse_r(text)) == ToMe(r)


@pytest.mark.parametrize("text", ["", "x", "8,", "(13)", "(1,2,3)", "-1", "(13,2)", "(13,nan)"])
def test_a_wrong_r_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="got"):
        parse_r(text)


def test_a_fractional_r_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"1\.5"):
        parse_r("1.5")
