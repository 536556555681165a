"""Functions timed on a device in turns, or recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tomepass.measuring.measure import seconds_a_call

_WARM_CALLS = 4

_SAMPLE_MILLISECONDS = 50.0

_MOST_CALLS = 200

Run = Callable[[], Any]


def milliseconds(runs: Sequence[Run], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds a call of each function, ``rounds`` samples; rounds swap their order."""
    warm = 0.0
    for run in runs:
        for _ in range(_WARM_CALLS):
            warm = 1000 * seconds_a_call(run, 1, device)
    calls = min(max(int(_SAMPLE_MILLISECONDS / max(warm, 1e-3)), 1), _MOST_CALLS)
    if device.type != "cuda":
        calls = 1
    found: list[list[float]] = [[] for _ in runs]
    for index in range(rounds):
        order = range(len(runs)) if index % 2 == 0 else reversed(range(len(runs)))
        for place in order:
            found[place].append(1000 * seconds_a_call(runs[place], calls, device))
    return found


def recorded(run: Run, device: torch.device) -> Run:
    """A call as a CUDA graph, without the time the processor takes to launch it."""
    if device.type != "cuda":
        return run
    make: Any = torch.cuda.Stream
    stream = make()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Run = graph.replay
    return replay
