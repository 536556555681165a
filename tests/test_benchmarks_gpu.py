"""The GPU benchmark on a tiny model: what it runs, not how fast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import tomepass
from benchmarks import gpu, gpu_models, gpu_profile, gpu_timing
from benchmarks.__main__ import app

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="measured, not interpreted")


@interpreted
@pytest.mark.parametrize("only", ["kernels", "bandwidth"])
def test_parts_run_without_a_gpu(only: str, tmp_path: Path) -> None:
    words = ["gpu", "--only", only, "--tiny", "--rounds", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / f"gpu_{only}.json").read_text())
    assert {"gpu", "torch", "triton", "command"} <= set(found["settings"])
    beneath = (tmp_path / f"gpu_{only}.md").read_text()
    assert f"command: python -m benchmarks gpu --only {only} --dtype bf16" in beneath
    assert "triton: " in beneath
    (row,) = found["rows"]
    if only == "kernels":
        assert row["maps of float32 equal"] is True
        assert row["same bits again"] is row["same bits alone"] is row["unmerge equal"] is True
        # bfloat16 is cut off in the interpreter, not rounded.
        assert max(row[f"{what}, error"] for what in ("merge", "LayerNorm", "sum")) < 2**-6
    else:
        assert row["merge"] > 0
        assert row["reached"] == "-"  # of a tiny model


@interpreted
def test_what_cannot_be_measured_is_refused() -> None:
    for words, reason in (
        (["--only", "vit_b"], "no CUDA device here"),
        (["--only", "vit_x", "--tiny"], "--only takes"),
        (["--mode", "fast", "--tiny"], "--mode takes"),
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
    monkeypatch.setattr(gpu, "measure", lambda *args, **options: found)
    monkeypatch.setattr(tomepass, "explain", lambda *args, **options: SimpleNamespace(kernels=()))
    setting = replace(gpu_models.TINY, model=lambda: torch.nn.Linear(1, 1))
    row = gpu.compared(setting, 4, "default", torch.float32, 1, torch.device("cpu"))
    assert (row["to reach"], row["reached"]) == (0.9, reached)


@pytest.mark.parametrize(("r", "merges"), [(16, "yes"), (0, "no")])
def test_the_planner_merges_or_declines(
    r: int, merges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tomepass.Plan(tomepass.ToMe(r), 1.2 if r else 1.0, "as measured", (), "inductor", ())
    monkeypatch.setattr(tomepass, "plan", lambda *args, **options: plan)
    setting = replace(gpu_models.TINY, model=lambda: torch.nn.Linear(1, 1))
    (row,) = gpu.planned(setting, "reduce-overhead", torch.float32, 1, torch.device("cpu"))
    assert (row["merges"], row["reached"]) == (merges, "yes")  # to decline is an answer


def test_settings_are_those_of_the_targets() -> None:
    tokens = {
        name: (s.pixels // (14 if name in ("dinov2_l", "siglip") else 16)) ** 2
        for name, s in gpu_models.SETTINGS.items()
    }
    assert tokens["long"] + 1 == 4097
    assert (tokens["dinov2_l"], tokens["siglip"], tokens["vit_l"]) == (1369, 729, 576)
    assert set(gpu.NAMES) > set(gpu_models.SETTINGS)
