"""Which configuration of a Triton kernel is fastest: measured once a kind of shape, on the device.

Only choices that leave every bit as it is are offered: which one wins depends on the machine and
the moment, results must not. Batch is no part of a shape's kind, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tomepass.errors import TomeError

_MILLISECONDS = 5
"""What a configuration is timed for."""


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched.

    Args:
        block: rows a program makes.
        across: what it goes through at a time; 0 where there is nothing to go through.
        warps: of 32 threads, a program.
        stages: loads under way at a time.
    """

    block: int
    across: int = 0
    warps: int = 4
    stages: int = 1

    @property
    def launch(self) -> dict[str, int]:
        """Triton's own options.

        Products and sums are rounded as they are written: which of them a compiler fuses is its
        own affair, and Triton's default differs between versions.
        """
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


Run = Callable[[Configuration], Any]

_CHOSEN: dict[tuple[Any, ...], Configuration] = {}


def run_fastest(
    kind: tuple[Any, ...],
    configurations: Sequence[Configuration],
    run: Run,
    device: torch.device,
) -> None:
    """Runs a kernel in the configuration that is fastest for this kind of shape.

    The first that runs is taken where none can be timed: in Triton's interpreter, and while a CUDA
    graph is being recorded.

    Raises:
        TomeError: if the device can run none of them.
    """
    if device.type != "cuda":
        run(configurations[0])
        return
    with torch.cuda.device(device):
        key = (*kind, torch.cuda.current_device())
        chosen = _CHOSEN.get(key)
        if chosen is None and torch.cuda.is_current_stream_capturing():
            next(_runnable(configurations, run))
            return
        if chosen is None:
            chosen = _CHOSEN[key] = fastest(configurations, run, _milliseconds)
        run(chosen)


def fastest(
    configurations: Sequence[Configuration], run: Run, milliseconds: Callable[[Any], float]
) -> Configuration:
    """The configuration that takes the least time; one that the device cannot run is left out."""
    times = {c: milliseconds(partial(run, c)) for c in _runnable(configurations, run)}
    return min(times, key=times.__getitem__)


def _runnable(configurations: Sequence[Configuration], run: Run) -> Iterator[Configuration]:
    """The configurations that the device can run, each after a run."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    found, reason = False, ""
    for configuration in configurations:
        try:
            run(configuration)  # compiles
        except (CompilationError, OutOfResources, PTXASError) as error:
            reason = str(error)  # the error itself would keep tensors alive
            continue
        found = True
        yield configuration
    if not found:
        raise TomeError(
            f"the device runs no configuration of a Triton kernel: {reason}",
            advice="set TOMEPASS_TRITON=0 to run the composite operators",
        )


def _milliseconds(run: Callable[[], Any]) -> float:
    """Of the device alone: a kernel may take less time than its launch."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=1, rep=_MILLISECONDS, return_mode="min"))
