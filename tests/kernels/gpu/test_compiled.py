"""Without a GPU Triton still compiles: every kernel becomes machine code for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
SHARED_ON_HOPPER = 227 * 1024


def compiled(cache: Path, *words: str) -> list[list[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py")), *words]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [line.split() for line in run.stdout.splitlines()]


@pytest.mark.deep
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    lines = compiled(tmp_path)
    assert {name for name, *_ in lines} == {
        *("match_image", "metric_kernel", "edges_kernel", "map_kernel"),
        *("sources_kernel", "merge_kernel", "gather_kernel"),
    }
    assert all(int(shared) <= SHARED_ON_HOPPER for _, shared, _ in lines)
    # Products run on the matrix unit.
    assert {name for name, _, unit in lines if unit == "wgmma"} == {"match_image", "edges_kernel"}


@pytest.mark.doors
def test_further_shapes_and_options_compile_for_hopper(tmp_path: Path) -> None:
    lines = compiled(tmp_path, "more")
    count = Counter(name for name, *_ in lines)
    assert count == {
        **{"match_image": 1, "metric_kernel": 6, "edges_kernel": 6, "map_kernel": 6},
        **{"merge_kernel": 6, "gather_kernel": 3},
    }
    assert all(int(shared) <= SHARED_ON_HOPPER for _, shared, _ in lines)


@pytest.mark.doors
@pytest.mark.parametrize("capability", ["86", "90"])
def test_programs_share_no_more_than_was_reckoned(capability: str, tmp_path: Path) -> None:
    """Or one that was chosen would not run: what the smallest devices have is 99 KiB."""
    lines = compiled(tmp_path, "fits", capability)
    assert {name for name, *_ in lines} == {"match_image", "edges_kernel"}
    assert len(lines) == 6
    for name, shared, reckoned in lines:
        assert int(shared) <= int(reckoned) <= 99 * 1024, (name, shared, reckoned)


@pytest.mark.doors
def test_sums_go_the_same_way_in_every_configuration(tmp_path: Path) -> None:
    """Which configuration is fastest differs from run to run: what it computes must not."""
    lines = [line for line in compiled(tmp_path, "orders") if len(line) > 1]
    assert {name for name, *_ in lines} == {"match_image", "metric_kernel", "merge_kernel"}
    assert max(len(found) for _, *found in lines) > 2
    for name, *found in lines:
        assert len(set(found)) == 1, (name, found)
