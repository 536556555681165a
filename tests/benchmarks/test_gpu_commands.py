"""The GPU benchmark on a tiny model: what it runs, not how fast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tomepass
from benchmarks.__main__ import app
from benchmarks.gpu import command as gpu
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu import profile as gpu_profile
from benchmarks.gpu import publishing, whole
from benchmarks.gpu import timing as gpu_timing

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="measured, not interpreted")


def run(out: Path, *words: str) -> dict[str, Any]:
    """A tiny run: the one JSON file it writes."""
    result = CliRunner().invoke(app, ["gpu", *words, "--tiny", "--rounds", "1", "--out", str(out)])
    assert result.exit_code == 0, (result.output, result.exception)
    (written,) = out.glob("*.json")
    found: dict[str, Any] = json.loads(written.read_text())
    assert {"gpu", "torch", "triton", "command"} <= set(found["settings"])
    beneath = written.with_suffix(".md").read_text()
    assert f"command: python -m benchmarks gpu {' '.join(words)}" in beneath
    assert "triton: " in beneath
    return found | {"file": written.stem}


@interpreted
def test_kernels_without_a_gpu(tmp_path: Path) -> None:
    # The interpreter cuts bfloat16 off where a device rounds.
    (row,) = run(tmp_path, "--only", "kernels", "--dtype", "fp16")["rows"]
    assert row["right"] == "yes"
    for wrong in ({"maps of float32 equal": False}, {"sum, error": 2**-9}):
        assert gpu_kernels.right(row | wrong, torch.float16) == "NO"


@interpreted
def test_bandwidth_without_a_gpu(tmp_path: Path) -> None:
    (row,) = run(tmp_path, "--only", "bandwidth")["rows"]
    assert row["merge"] > 0
    assert row["reached"] == "-"  # of a tiny model


@interpreted
@pytest.mark.doors
@pytest.mark.parametrize("only", sorted({*gpu.NAMES} - {"kernels", "bandwidth"}))
def test_every_part_runs_without_a_gpu(only: str, tmp_path: Path) -> None:
    rows = run(tmp_path, "--only", only, *(["--mode", "default"] * (only in publishing.COMPILED)))[
        "rows"
    ]
    assert rows
    if only == "check":
        assert "FAIL" not in {row["verdict"] for row in rows}
    else:
        assert {row.get("reached", "-") for row in rows} == {"-"}


def test_a_file_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one measured no other writes over."""
    asked: list[Any] = []
    monkeypatch.setattr(whole, "compared", lambda s, r, *rest: asked.append(r) or {"r": r})
    found = run(tmp_path / "a", "--only", "vit_b", "--mode", "default", "--r", "4")
    assert found["file"] == "gpu_vit_b_default_r4_bf16_tiny"
    assert (found["settings"]["r"], asked) == (4, [4])
    monkeypatch.setattr(gpu_kernels, "correct", lambda *given: [{"shape": "tiny"}])
    command = ["gpu", "--only", "kernels", "--tiny", "--out", str(tmp_path)]
    for dtype in ("bf16", "fp16", "fp32"):
        assert CliRunner().invoke(app, [*command, "--dtype", dtype]).exit_code == 0
    names = {f"gpu_kernels_{dtype}_tiny" for dtype in ("bf16", "fp16", "fp32")}
    assert {path.stem for path in tmp_path.glob("*.json")} == names


@interpreted
def test_what_cannot_be_measured_is_refused() -> None:
    for words, reason in (
        (["--only", "vit_b"], "no CUDA device here"),
        (["--only", "vit_x", "--tiny"], "--only takes"),
        (["--mode", "fast", "--tiny"], "--mode takes"),
        (["--only", "vit_b", "--r", "14"], "--r with --only vit_b takes one of [13, 16], got 14"),
        (["--only", "kernels", "--r", "4"], "--r with --only kernels takes one of []"),
    ):
        result = CliRunner().invoke(app, ["gpu", *words])
        assert result.exit_code == 2
        assert reason in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("match_image", "matching"),
        ("edges_kernel", "matching"),
        ("merge_kernel", "merging"),
        ("triton_poi_fused_add_tome_merge_size_3", "merging"),
        ("triton_poi_fused_tome_log_size_2", "attention"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linear"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNN", "linear"),
        ("triton_tem_fused_addmm_12", "linear"),
        ("triton_per_fused_native_layer_norm_4", "rest"),
    ],
)
def test_a_kernel_is_told_by_its_name(name: str, kind: str) -> None:
    assert gpu_profile.kind_of(name) == kind


@interpreted
def test_functions_take_turns() -> None:
    order: list[str] = []
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    times = gpu_timing.milliseconds(runs, 2, torch.device("cpu"))
    assert [len(found) for found in times] == [2, 2]
    assert order[-4:] == ["a", "b", "b", "a"]


@pytest.mark.parametrize(("ratio", "reached"), [(1.53, "yes"), (1.52, "NO")])
def test_a_target_is_reached_or_not(
    ratio: float, reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = SimpleNamespace(median=ratio, low=ratio, high=ratio)
    arm = SimpleNamespace(milliseconds=spread, compile_seconds=1.0)
    found = SimpleNamespace(ratio=spread, ratio_ideal=1.7, original=arm, merged=arm)
    monkeypatch.setattr(whole, "measure", lambda *args, **options: found)
    monkeypatch.setattr(tomepass, "explain", lambda *args, **options: SimpleNamespace(kernels=()))
    setting = replace(gpu_models.TINY, model=lambda: torch.nn.Linear(1, 1))
    row = whole.compared(setting, 4, "default", torch.float32, 1, torch.device("cpu"))
    assert (row["to reach"], row["reached"]) == (0.9, reached)


@pytest.mark.parametrize(("r", "merges"), [(16, "yes"), (0, "no")])
def test_the_planner_merges_or_declines(
    r: int, merges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tomepass.Plan(tomepass.ToMe(r), 1.2 if r else 1.0, "as measured", (), "inductor", ())
    monkeypatch.setattr(tomepass, "plan", lambda *args, **options: plan)
    setting = replace(gpu_models.TINY, model=lambda: torch.nn.Linear(1, 1))
    (row,) = whole.planned(setting, "reduce-overhead", torch.float32, 1, torch.device("cpu"))
    assert (row["merges"], row["reached"]) == (merges, "yes")  # to decline is an answer


def test_settings_are_those_of_the_targets() -> None:
    held = {
        name: (
            (s.pixels // (14 if name in ("dinov2_l", "siglip") else 16)) ** 2,
            *(s.batch, s.counts, s.target),
        )
        for name, s in gpu_models.SETTINGS.items()
    }
    assert held == {
        "vit_b": (196, 256, (13, 16), 0.9),
        "vit_l": (576, 64, (23,), 0.9),
        "dinov2_l": (1369, 32, (50,), 0.9),
        "siglip": (729, 64, (24,), 0.9),
        "long": (4096, 8, (300,), 0.9),
        "batch1": (196, 1, (16,), None),
    }
    training = gpu_models.TRAINING
    assert (training.pixels, training.batch, training.counts) == (224, 128, (16,))
    assert set(gpu.NAMES) > set(gpu_models.SETTINGS)


@pytest.mark.doors
@pytest.mark.parametrize(("r", "ideal"), [(13, 1.69), (16, 2.00)])
def test_the_ideal_is_that_of_the_targets(r: int, ideal: float) -> None:
    model = gpu_models.SETTINGS["vit_b"].model()
    report = tomepass.explain(model, r=r, example_inputs=torch.randn(1, 3, 224, 224))
    assert report.speedup_ideal == pytest.approx(ideal, abs=0.005)
