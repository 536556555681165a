"""The command line: output, JSON, exit statuses, and messages for wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from depth import at_hand
from typer.testing import CliRunner
from zoo import make_model

from tomepass.cli.commands import app


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model("vit").save_pretrained(folder)
    return str(folder)


def _run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "120"})
    assert result.exit_code == status, result.output
    return result.output


def test_explain_prints_the_blocks(model_dir: str) -> None:
    printed = _run("explain", "--model", model_dir, "--r", "8")
    assert "65 -> 57" in printed
    assert "49 -> 41" in printed
    assert "protected  token 0" in printed


@pytest.mark.parametrize(
    ("r", "counts"),
    at_hand(
        [("8", [8, 8, 8]), ("9,4", [9, 4, 0]), ("(8,-1)", [16, 8, 0])], [("(8,-1)", [16, 8, 0])]
    ),
)
def test_explain_takes_every_form_of_r_and_prints_json(
    model_dir: str, r: str, counts: list[int]
) -> None:
    report = json.loads(_run("explain", "--model", model_dir, "--r", r, "--json"))
    assert [b["r"] for b in report["streams"][0]["blocks"]] == counts
    assert report["ok"]


def test_explain_of_a_model_that_is_refused_exits_with_1(tmp_path: Path) -> None:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2])
    SwinForImageClassification(config).save_pretrained(tmp_path)
    assert "refused" in _run("explain", "--model", str(tmp_path), status=1)


@pytest.mark.deep
def test_check_passes_with_status_0_and_json(model_dir: str) -> None:
    args = ("check", "--model", model_dir, "--r", "4", "--backend", "eager", "--batch", "2")
    assert "All checks pass" in _run(*args)
    assert json.loads(_run(*args, "--json"))["ok"]


def test_check_that_fails_exits_with_1(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tomepass.proof import check as equivalence

    monkeypatch.setattr(equivalence, "FLOAT32_TOLERANCE", -1.0)
    args = ("check", "--model", model_dir, "--r", "4", "--backend", "eager", "--batch", "2")
    assert "FAIL" in _run(*args, status=1)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("explain", "--model", "./nowhere"), "no such model directory"),
        (("explain", "--model", "{dir}", "--r", "many"), "r"),
        (("explain", "--model", "{dir}", "--r=-3"), "0 or more"),
        (("check", "--model", "{dir}", "--dtype", "int3"), "known: bf16, fp16, fp32"),
        (("check", "--model", "{dir}", "--backend", "nobody"), "knows no backend 'nobody'"),
        (("check", "--model", "{dir}", "--r", "1,2,3,4"), "at most 3"),
        (("check", "--model", "{dir}", "--images", "./none"), "no such image folder"),
        (("demo", "--model", "{dir}"), "belong together"),
    ],
)
def test_wrong_input_is_said_with_status_2_and_no_traceback(
    model_dir: str, args: tuple[str, ...], said: str
) -> None:
    printed = _run(*(a.format(dir=model_dir) for a in args), status=2)
    assert said in printed
    assert "Traceback" not in printed


def test_bench_measures_each_r(model_dir: str, tmp_path: Path) -> None:
    args = ("bench", "--model", model_dir, "--r", "4", "8", "--backend", "eager", "--batch", "2")
    out = str(tmp_path / "bench")
    measured = json.loads(_run(*args, "--rounds", "1", "--out", out, "--json"))
    assert [m["ratio_ideal"] > 1 for m in measured["measurements"]] == [True, True]
    assert {p.suffix for p in (tmp_path / "bench").iterdir()} == {".json", ".png"}


def test_help_names_all_commands() -> None:
    printed = _run("--help")
    assert all(name in printed for name in ("demo", "explain", "check", "bench", "export"))
