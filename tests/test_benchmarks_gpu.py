"""The GPU benchmark on a tiny model: what it runs, not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

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
    (row,) = found["rows"]
    if only == "kernels":
        assert row["maps of float32 equal"] is True
        assert row["same bits again"] is row["same bits alone"] is True
    else:
        assert row["merge"] > 0


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


def test_settings_are_those_of_the_targets() -> None:
    tokens = {
        name: (s.pixels // (14 if name in ("dinov2_l", "siglip") else 16)) ** 2
        for name, s in gpu_models.SETTINGS.items()
    }
    assert tokens["long"] + 1 == 4097
    assert (tokens["dinov2_l"], tokens["siglip"], tokens["vit_l"]) == (1369, 729, 576)
    assert set(gpu.NAMES) > set(gpu_models.SETTINGS)
