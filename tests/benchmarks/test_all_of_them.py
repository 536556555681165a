"""The benchmarks' front, and how a profile becomes a table; what they measure is not asserted."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import results
from benchmarks.__main__ import app
from benchmarks.accuracy import accuracy
from benchmarks.cpu import attention, breakdown, compile_time, kernels, linear
from benchmarks.results import Results, cell

WIDTH = 768
NAMES = {
    *("throughput", "latency", "breakdown", "scaling", "attention", "kernels", "linear"),
    *("openvino-layers", "compile-time", "capture-time", "accuracy", "adaptive"),
    *("policy", "gpu", "doors", "quantization", "tensorrt"),
}


def event(name: str, start: float, milliseconds: float, shapes: Any = ()) -> Any:
    """What the profiler tells of one operator or kernel, in microseconds."""
    span = SimpleNamespace(start=1000 * start, end=1000 * (start + milliseconds))
    return SimpleNamespace(
        name=name,
        time_range=span,
        self_cpu_time_total=1000 * milliseconds,
        input_shapes=shapes,
    )


def test_every_benchmark_stands_behind_the_front() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert set(result.output.split()) >= NAMES
    for name in NAMES:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("mkldnn::_linear_pointwise", (), "linear"),
        ("aten::addmm", (), "linear"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", (), "attention"),
        ("graph_0_cpp_fused_LayerNorm_tome_log_size_5", (), "attention"),
        ("graph_0_cpp_fused_tome_log_size_tome_merge_size_view_4", (), "attention"),
        ("graph_0_cpp_fused_Linear_tome_match_6", (), "matching"),
        ("tome::match_cpu", (), "matching"),
        ("tome::merge_cpu", (), "merging"),
        ("aten::bmm", [[16, 98, 64], [16, 64, 98]], "matching"),
        ("aten::bmm", [[16, 181, 197], [16, 197, WIDTH]], "merging"),
        ("graph_0_cpp_fused_tome_merge_7", (), "merging"),
        ("graph_0_cpp_fused_LayerNorm_add_3", (), "glue"),
        ("mkldnn::_convolution_pointwise", (), "embedding"),
        ("aten::empty", (), None),
    ],
)
def test_a_kernel_is_told_by_the_operators_in_its_name(
    name: str, shapes: Any, kind: str | None
) -> None:
    assert breakdown._kind(event(name, 0, 1, shapes), WIDTH) == kind


def test_a_profile_is_split_by_block_and_kind() -> None:
    linear = "mkldnn::_linear_pointwise"
    events = [
        event("merged", 0, 20),
        event("unmerged", 25, 5),
        event("mkldnn::_convolution_pointwise", 0, 2),
        *(event(linear, 2 + i, 1) for i in range(6)),
        event("graph_0_cpp_fused_LayerNorm_1", 8, 3),
        event(linear, 11, 1),
        event("tome::match_cpu", 12, 4),
        event(linear, 26, 3),  # in the other form's call
    ]
    (other,) = breakdown._calls(events, "unmerged", WIDTH)
    assert other == {(0, "linear"): 3.0, (-1, "rest"): 2.0}
    (times,) = breakdown._calls(events, "merged", WIDTH)
    assert times == {
        (-1, "glue"): 2.0,
        (0, "linear"): 6.0,
        (1, "glue"): 3.0,
        (1, "linear"): 1.0,
        (1, "matching"): 4.0,
        (-1, "rest"): 4.0,
    }
    rows = list(breakdown._rows({"unmerged": times, "merged": times}, depth=2))
    assert [row["what"] for row in rows] == ["unmerged", "merged", "block 0", "block 1"]
    kinds = {"linear": 7.0, "attention": 0.0, "matching": 4.0, "merging": 0.0}
    assert rows[0] == {"what": "unmerged", **kinds, "glue": 5.0, "rest": 4.0}
    assert sum(rows[3][kind] for kind in breakdown.KINDS) == 8.0


def test_matching_and_merging_are_measured_beside_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    words = ["--tokens", "9", "12", "--r", "2", "--batch", "2", "--rounds", "1", "--dtype", "fp32"]
    result = CliRunner().invoke(kernels.app, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "copy of" in result.output
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [9, 12]
    assert all(row[name] > 0 for row in found["rows"] for name in kernels.COLUMNS)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
def test_linear_layers_are_measured_at_several_rows(tmp_path: Path) -> None:
    words = ["linear", "--rows", "5", "8", "--rounds", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "linear.json").read_text())
    assert [row["rows"] for row in found["rows"]] == [5, 8]
    assert all(row[name] > 0 for row in found["rows"] for name in linear.SHAPES)


@pytest.mark.parametrize("draw", [results.bars, results.stacks, results.lines])
def test_results_leave_a_table_and_its_figures_behind(
    draw: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plot(axes: Any, rows: Any) -> None:
        names = [1.0, 2.0] if draw is results.lines else ["a", "b"]
        draw(axes, names, {"one": [r["x"] for r in rows], "two": [r["y"] for r in rows]})

    Results(
        name="made_up",
        title="Made up",
        columns={"x": cell("x"), "sum": lambda row: f"{row['x'] + row['y']:.1f}"},
        rows=[{"x": 1, "y": 2}, {"x": 3, "y": 0.25}],
        settings={"of": "a test"},
        plot=plot,
    ).publish(tmp_path)
    shown = capsys.readouterr().out
    assert "Made up" in shown
    assert "3.2" in shown
    assert torch.__version__ in shown
    table = "| x | sum |\n| --- | --- |\n| 1 | 3.0 |\n| 3 | 3.2 |\n"
    assert (tmp_path / "made_up.md").read_text() == table
    data = json.loads((tmp_path / "made_up.json").read_text())
    assert data["rows"] == [{"x": 1, "y": 2}, {"x": 3, "y": 0.25}]
    assert (data["benchmark"], data["settings"]) == ("made_up", {"of": "a test"})
    assert data["environment"]["torch"] == torch.__version__
    assert (tmp_path / "made_up.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.deep
def test_a_first_call_is_timed_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Not the compile itself: one layer, and a model that is not there."""
    assert compile_time._first_call("start-up", False, str(tmp_path), "none", 4, 2, "fp32") > 0
    with pytest.raises(RuntimeError, match=r"(?s)merged could not be compiled: .*no model 'none'"):
        compile_time._first_call("merged", False, str(tmp_path), "none", 4, 2, "fp32")


@pytest.mark.parametrize("path", attention.PATHS[1:], ids=lambda path: path.__name__)
@pytest.mark.parametrize("tokens", [5, 16, 37])
def test_every_way_to_write_proportional_attention_is_exact(path: Any, tokens: int) -> None:
    q, k, v, log = attention.inputs(tokens, 2, torch.float64)
    weights = ((q @ k.mT) / attention.HEAD**0.5).exp() * log.exp()[:, None, None]
    expected = (weights @ v) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(path(q, k, v, log), expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(attention.without_sizes(q, k, v, log), expected, atol=1e-3)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits model with 24 images."""
    model, data, label = accuracy.load(None, None, None)
    few = type(data)(data.pixel_values[:24], data.labels[:24], data.names[:24])
    monkeypatch.setattr(accuracy, "load", lambda *_: (model, few, label))


TIMED = ["--backend", "eager", "--batch", "2", "--rounds", "2"]


@pytest.mark.deep
def test_accuracy_compares_methods_at_equal_macs_and_goes_on(
    few_digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["accuracy", "--no-speed", "--methods", "ToMe", "Prune, random", "--macs", "0.7"]
    result = CliRunner().invoke(app, [*asked, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    data = json.loads((tmp_path / "accuracy.json").read_text())
    merged, pruned = data["rows"]
    assert (merged["method"], pruned["method"]) == ("ToMe", "Prune, random")
    assert 0.69 < merged["macs"] <= 0.7
    assert 0.69 < pruned["macs"] <= 0.7
    assert merged["KL"] < pruned["KL"]
    assert data["settings"]["images"] == 12
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    monkeypatch.setattr(accuracy._Run, "judge", None)  # nothing is judged again
    again = CliRunner().invoke(app, [*asked, "--out", str(tmp_path)], catch_exceptions=False)
    assert again.exit_code == 0
    timed = [*asked[:1], *asked[2:], *TIMED, "--out", str(tmp_path)]
    with_speeds = CliRunner().invoke(app, timed, catch_exceptions=False)
    assert with_speeds.exit_code == 0
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    rate = statistics.median(row["unmerged images/s"] for row in rows)
    for row, scored in zip(rows, (merged, pruned), strict=True):
        assert row["KL"] == scored["KL"]
        assert row["images/s"] == pytest.approx(rate * row["speed-up"])
    monkeypatch.setattr(accuracy._Run, "_speed", None)  # nor timed
    assert CliRunner().invoke(app, timed, catch_exceptions=False).exit_code == 0
    monkeypatch.setattr(accuracy, "split", lambda *_: (torch.arange(8), torch.arange(8, 24)))
    others = CliRunner().invoke(app, [*asked, "--out", str(tmp_path)])  # of other images: judged
    assert isinstance(others.exception, AttributeError)


def test_accuracy_says_what_it_leaves_out(few_digits: None, tmp_path: Path) -> None:
    asked = ["accuracy", "--no-speed", "--methods", "ToMe", "--macs", "0.7", "0.01"]
    result = CliRunner().invoke(app, [*asked, "--out", str(tmp_path)], catch_exceptions=False)
    assert "left out: macs=0.01 cannot be reached" in " ".join(result.stderr.split())
    assert len(json.loads((tmp_path / "accuracy.json").read_text())["rows"]) == 1


@pytest.mark.deep
def test_equal_macs_are_equal_within_a_hundredth(few_digits: None, tmp_path: Path) -> None:
    """One token of the first of few blocks is worth more than that."""
    asked = ["accuracy", "--no-speed", "--methods", "Prune, random", "--macs", "0.6"]
    result = CliRunner().invoke(app, [*asked, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    (row,) = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert 0.59 <= row["macs"] <= 0.6


def test_accuracy_knows_its_methods_by_name(few_digits: None, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["accuracy", "--methods", "Tome", "--out", str(tmp_path)])
    assert "no method 'Tome'; known: all, ablations, ToMe" in str(result.exception)
