"""The benchmarks' front, and how a profile becomes a table; what they measure is not asserted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import attention, breakdown, kernels
from benchmarks.__main__ import app

WIDTH = 768


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
    for name in ("throughput", "breakdown", "scaling", "attention", "kernels", "capture-time"):
        assert name in result.output


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
    assert rows[0] == ("unmerged", "7.0", "0.0", "4.0", "0.0", "5.0", "4.0", "20.0")
    assert [row[0] for row in rows] == ["unmerged", "merged", "0", "1"]
    assert rows[3][-1] == "8.00"


def test_matching_and_merging_are_measured_beside_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    words = ["--tokens", "9", "12", "--r", "2", "--batch", "2", "--rounds", "1", "--dtype", "fp32"]
    result = CliRunner().invoke(kernels.app, words)
    assert result.exit_code == 0, result.output
    assert "copy of" in result.output
    assert all(str(tokens) in result.output for tokens in (9, 12))


@pytest.mark.parametrize("path", attention.PATHS[1:], ids=lambda path: path.__name__)
@pytest.mark.parametrize("tokens", [5, 16, 37])
def test_every_way_to_write_proportional_attention_is_exact(path: Any, tokens: int) -> None:
    q, k, v, log = attention.inputs(tokens, 2, torch.float64)
    weights = ((q @ k.mT) / attention.HEAD**0.5).exp() * log.exp()[:, None, None]
    expected = (weights @ v) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(path(q, k, v, log), expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(attention.without_sizes(q, k, v, log), expected, atol=1e-3)
