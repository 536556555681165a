"""Without a GPU Triton still compiles: every kernel becomes machine code for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SHARED_ON_HOPPER = 227 * 1024


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py"))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, *_ in lines} == {
        *("match_image", "metric_kernel", "edges_kernel", "map_kernel"),
        *("sources_kernel", "merge_kernel", "gather_kernel"),
    }
    assert all(int(shared) <= SHARED_ON_HOPPER for _, shared, _ in lines)
    # Products run on the matrix unit.
    assert {name for name, _, unit in lines if unit == "wgmma"} == {"match_image", "edges_kernel"}
