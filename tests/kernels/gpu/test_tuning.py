"""Configurations: the fastest that runs, chosen once a kind of shape."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tomepass import TomeError
from tomepass.kernels.gpu import match as gpu_match
from tomepass.kernels.gpu import merge as gpu_merge
from tomepass.kernels.gpu import tuning
from tomepass.kernels.gpu.tuning import Configuration, fastest, run_fastest

pytest.importorskip("triton")
FIRST, SECOND, THIRD = (Configuration(rows) for rows in (1, 2, 4))


def refuse(*refused: Configuration) -> Any:
    from triton.runtime.errors import OutOfResources

    def run(configuration: Configuration) -> None:
        if configuration in refused:
            raise OutOfResources(300000, 232448, "shared memory")

    return run


def test_the_fastest_that_runs_is_taken() -> None:
    times = iter([3.0, 1.0])
    chosen = fastest([FIRST, SECOND, THIRD], refuse(SECOND), lambda run: next(times))
    assert chosen == THIRD


def test_a_device_that_runs_none_is_told_what_to_do() -> None:
    with pytest.raises(TomeError, match=r"(?s)runs no configuration.*TOMEPASS_TRITON=0"):
        fastest([FIRST, SECOND], refuse(FIRST, SECOND), lambda run: 1.0)


def test_without_a_device_the_first_is_taken() -> None:
    ran: list[Configuration] = []
    run_fastest(("kind",), [SECOND, FIRST], ran.append, torch.device("cpu"))
    assert ran == [SECOND]
    assert not tuning._CHOSEN


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CUDA device to choose for, as far as choosing asks it."""
    state = SimpleNamespace(capturing=False, current=0, timed=0)

    def milliseconds(run: Any) -> float:
        state.timed += 1
        return float(state.timed)

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    return state


CUDA = torch.device("cuda")


def test_a_choice_is_made_once_a_kind_and_a_device(device: SimpleNamespace) -> None:
    ran: list[Configuration] = []
    run_fastest(("kind",), [SECOND, FIRST], ran.append, CUDA)
    assert ran == [SECOND, FIRST, SECOND]  # each tried, then the fastest
    run_fastest(("kind",), [SECOND, FIRST], ran.append, CUDA)
    assert ran[3:] == [SECOND]
    assert device.timed == 2
    run_fastest(("other",), [FIRST], ran.append, CUDA)
    device.current = 1
    run_fastest(("kind",), [FIRST], ran.append, CUDA)
    assert device.timed == 4
    assert set(tuning._CHOSEN) == {("kind", 0), ("other", 0), ("kind", 1)}


def test_while_a_graph_is_recorded_the_first_that_runs_is_taken(device: SimpleNamespace) -> None:
    device.capturing = True
    ran: list[Configuration] = []

    def run(configuration: Configuration) -> None:
        refuse(FIRST)(configuration)
        ran.append(configuration)

    run_fastest(("kind",), [FIRST, SECOND, THIRD], run, CUDA)
    assert ran == [SECOND]
    assert not device.timed
    assert not tuning._CHOSEN  # it is timed yet, outside of a graph
    device.capturing = False
    run_fastest(("kind",), [THIRD], run, CUDA)
    device.capturing = True
    run_fastest(("kind",), [FIRST, SECOND], run, CUDA)
    assert ran[-1] == THIRD
    with pytest.raises(TomeError, match="runs no configuration"):
        run_fastest(("none",), [FIRST], refuse(FIRST), CUDA)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("width", [7, 192, 768, 1152, 4096])
def test_rows_fill_the_threads_that_load_them(width: int, norm: bool) -> None:
    for configuration in gpu_merge.row_configurations(width, norm=norm):
        across = 1 << (width - 1).bit_length()
        assert configuration.block * across >= 8 * 32 * configuration.warps
        # A sum over channels must not depend on what is fastest.
        assert configuration.warps == 4 or not norm


@pytest.mark.parametrize("width", [16, 24, 32, 64, 128, 256])
def test_tiles_of_a_metric_fill_the_threads_that_load_them(width: int) -> None:
    """Or they are the only ones offered: else the order of its sum would differ."""
    across = max(1 << (width - 1).bit_length(), 16)
    offered = [gpu_match.metric_configurations(width)]
    offered += [gpu_match.image_configurations(block, width) for block in (16, 32, 64, 128)]
    for found in filter(lambda found: len(found) > 1, offered):
        for configuration in found:
            rows = configuration.across or configuration.block
            assert rows * across >= 8 * 32 * configuration.warps
    assert all(offered)


def test_what_a_compiler_may_fuse_is_not_left_to_it() -> None:
    assert FIRST.launch["enable_fp_fusion"] is False
