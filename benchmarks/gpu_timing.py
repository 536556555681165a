"""Functions timed on a device in turns, and the memory they hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tomepass.benchmarking import peak_tensor_bytes

_WARM_CALLS = 4
_SAMPLE_MILLISECONDS = 50.0
_MOST_CALLS = 200

Run = Callable[[], Any]


def milliseconds(runs: Sequence[Run], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds a call of each function, ``rounds`` samples; rounds swap their order."""
    warm = 0.0
    for run in runs:
        for _ in range(_WARM_CALLS):
            warm = sample(run, 1, device)
    calls = min(max(int(_SAMPLE_MILLISECONDS / max(warm, 1e-3)), 1), _MOST_CALLS)
    if device.type != "cuda":
        calls = 1
    found: list[list[float]] = [[] for _ in runs]
    for index in range(rounds):
        order = range(len(runs)) if index % 2 == 0 else reversed(range(len(runs)))
        for place in order:
            found[place].append(sample(runs[place], calls, device))
    return found


def sample(run: Run, calls: int, device: torch.device) -> float:
    """Milliseconds a call, between two events on a CUDA device."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return 1000 * (time.perf_counter() - started) / calls
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def recorded(run: Run, device: torch.device) -> Run:
    """A call as a CUDA graph, without the time the processor takes to launch it."""
    if device.type != "cuda":
        return run
    make: Any = torch.cuda.Stream
    stream = make()
    with torch.cuda.stream(stream):
        for _ in range(_WARM_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Run = graph.replay
    return replay


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most tensor memory a call holds beyond what was there before it."""
    return peak_tensor_bytes(run, device)
