"""The C++ program of the documentation, built by its own CMake file and run on a package."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tomepass.formats import DOORS

SOURCE = Path(__file__).parents[2] / "docs" / "examples" / "aoti"

pytestmark = [
    pytest.mark.doors,
    pytest.mark.skipif(
        not (shutil.which("cmake") and (shutil.which("g++") or shutil.which("clang++"))),
        reason="needs cmake and a C++ compiler",
    ),
]


def _do(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_cpp_program_gives_the_logits_of_apply(exported: Any, tmp_path: Path) -> None:
    package = tmp_path / "vit.pt2"
    DOORS["aoti"].write(exported.program, package)
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    _do("cmake", "-S", SOURCE, "-B", build, prefix, "-DCMAKE_BUILD_TYPE=Debug")
    _do("cmake", "--build", build)
    for x, logits in exported.expected.values():
        torch.save(x, tmp_path / "images.pt")
        out = tmp_path / "logits.pt"
        _do(build / "run_package", package, tmp_path / "images.pt", out)
        assert (torch.load(out) - logits).abs().max() < 1e-4
    nothing = subprocess.run([build / "run_package", "none.pt2", "none.pt", "out.pt"])
    assert nothing.returncode == 1
