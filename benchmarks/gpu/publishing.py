"""What one part of the GPU benchmark was asked for, and the files it writes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import SETTINGS
from benchmarks.results import Results

Row = dict[str, Any]

COMPILED = (*SETTINGS, "training", "profile", "plan")
"""Parts whose figures depend on Inductor's mode."""


@dataclass(frozen=True)
class Asked:
    """One part, and all that its figures depend on beside the device.

    Args:
        only: the part's name.
        mode: of Inductor; counts in the parts of :data:`COMPILED` alone.
        r: one of the setting's counts; None for all of them.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        rounds: interleaved rounds.
        tiny: of a tiny model.
        minutes: for the part ``correctness``: no case is started later.
    """

    only: str
    mode: str = "default"
    r: int | None = None
    dtype: str = "bf16"
    rounds: int = 10
    tiny: bool = False
    minutes: float = 15.0

    @property
    def _told(self) -> dict[str, Any]:
        told = {
            "mode": self.mode if self.only in COMPILED else None,
            "r": self.r,
            "dtype": self.dtype,
        }
        return {name: value for name, value in told.items() if value is not None}

    @property
    def arguments(self) -> list[str]:
        """Of ``python -m benchmarks gpu``."""
        told: dict[str, Any] = {"only": self.only, **self._told, "rounds": self.rounds}
        if self.only == "correctness":
            told["minutes"] = f"{self.minutes:g}"
        words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
        return [*words, *(["--tiny"] if self.tiny else [])]

    @property
    def parts(self) -> list[str]:
        """Of the files' name: no command writes over the files of another."""
        told = [f"r{value}" if name == "r" else value for name, value in self._told.items()]
        return [self.only, *told, *(["tiny"] if self.tiny else [])]

    @property
    def file(self) -> str:
        """The files' name, without its suffix."""
        return "_".join(["gpu", *self.parts])


def publish(asked: Asked, rows: Iterable[Row], device: torch.device, out: Path) -> None:
    """Writes the files anew after each row, so that what was measured is never lost; then prints.

    ``settings`` in the JSON says with ``complete`` whether all rows are there.
    """
    where = {
        "command": " ".join(["python -m benchmarks gpu", *asked.arguments]),
        **versions(device),
    }
    settings = {name: getattr(asked, name) for name in ("only", "mode", "r", "dtype", "rounds")}
    found: list[Row] = []

    def results(complete: bool) -> Results:
        return Results(
            name=asked.file,
            title=f"{', '.join(asked.parts)}, {device_name(device)}",
            columns={name: shown(name) for name in found[0]},
            rows=found,
            settings={**settings, "tiny": asked.tiny, **where, "complete": complete},
            plot=None,
            note="; ".join(f"{key}: {value}" for key, value in where.items()),
        )

    for row in rows:
        # Of a tiny model no figure is a verdict.
        found.append(row | {"reached": "-"} if asked.tiny and "reached" in row else row)
        results(complete=False).write(out)
    results(complete=True).publish(out)


def shown(name: str) -> Callable[[Any], str]:
    """A column that shows one figure of a row, to four digits."""

    def show(row: Any) -> str:
        value = row[name]
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return show


def device_name(device: torch.device) -> str:
    """The GPU's, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions(device: torch.device) -> dict[str, str]:
    """What the figures depend on, beside what every benchmark says."""
    import triton

    found = {"gpu": device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn.version
        found |= {"driver": driver(), "cudnn": str(cudnn())}
    return found


def driver() -> str:
    """The version of NVIDIA's driver; ``unknown`` where its tool is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout.split() or ["unknown"])[0]
