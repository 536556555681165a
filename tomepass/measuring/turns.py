"""Functions timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

_WARM_ROUNDS = 2


def medians_in_turns(runs: Sequence[Callable[[], Any]], rounds: int, calls: int) -> list[float]:
    """Milliseconds a call of each function: medians of interleaved rounds of ``calls`` calls."""
    samples: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for _ in range(rounds + _WARM_ROUNDS):
            for run, found in zip(runs, samples, strict=True):
                started = time.perf_counter()
                for _ in range(calls):
                    run()
                found.append(1000 * (time.perf_counter() - started) / calls)
    return [median(found[_WARM_ROUNDS:]) for found in samples]
