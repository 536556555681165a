"""What the smaller benchmarks share: functions timed in turns, a table with its machine below."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tomepass.benchmarking import environment

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


def show(shown: Table) -> None:
    """Prints a table and, below it, what its figures were measured with."""
    console = Console()
    console.print(shown)
    where = environment()
    console.print(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}")
