"""The largest number of bytes that tensors hold at once while something runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def peak_tensor_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most tensor memory that one call holds at a time, in bytes, its result included.

    What was allocated before the call (weights, inputs) does not count. On the CPU it is read
    off the allocation events of PyTorch's profiler, on CUDA off the caching allocator; memory
    that libraries allocate for themselves, and the private pools of CUDA graphs, are not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    return _running_maximum(_allocations(run))


def _allocations(run: Callable[[], Any]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU by a call, in order."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():  # the profiler's library logs its starts and stops
        profiler.start()
    try:
        result = run()
    finally:
        with _quiet_stderr():
            profiler.stop()
    del result
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def _running_maximum(changes: Sequence[int]) -> int:
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops what native code writes to standard error, which Python's own streams do not see."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
