"""Are the kernels right on this device? The most telling cases first, as many as time allows."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import kernels, on_device
from benchmarks.gpu.models import TINY
from benchmarks.gpu.on_device import Case

Row = dict[str, Any]

_NOT_RUN = "not run"


def correctness(
    dtype: torch.dtype,
    device: torch.device,
    minutes: float,
    tiny: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """A row a case, whether it is right and why not.

    Args:
        dtype: of the tokens at the benchmark's own shapes; other cases bring theirs.
        device: CUDA, or with ``tiny`` a CPU on which Triton interprets.
        minutes: no case is started later. Those left have a row that says so.
        tiny: small cases alone.
        clock: seconds.
    """
    cases = tiny_cases(dtype) if tiny else all_cases(dtype)
    yield from run_cases(cases, device, 60 * minutes, clock)


def run_cases(
    cases: Mapping[str, Case], device: torch.device, seconds: float, clock: Callable[[], float]
) -> Iterator[Row]:
    """Runs cases in turn until time is up, or until the device answers no more."""
    end = clock() + seconds
    why = ""
    for name, case in cases.items():
        start = clock()
        if not why and start >= end:
            why = f"{seconds / 60:g} minutes were over"
        if why:
            yield {"case": name, "right": _NOT_RUN, "seconds": 0.0, "error": why}
            continue
        error = _error_of(case, device)
        yield {
            "case": name,
            "right": "NO" if error else "yes",
            "seconds": clock() - start,
            "error": error,
        }
        if error and not _answers(device):
            why = f"the device answers no more since {name!r}"


def _error_of(case: Case, device: torch.device) -> str:
    """What a case raised, with the line of code that did; empty where it is right."""
    try:
        torch.manual_seed(0)
        with on_device.exact_products():
            case(device.type)
        _wait_for(device)  # for errors of kernels that still run
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        said = " ".join(str(error).split())[:300]
        return f"{type(error).__name__}: {said} ({line})".replace("|", "/")
    return ""


def _answers(device: torch.device) -> bool:
    """False after an illegal access, say: no kernel of this process will run again."""
    try:
        _wait_for(device)
    except Exception:
        return False
    return True


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def all_cases(dtype: torch.dtype) -> dict[str, Case]:
    """The kernels at the benchmark's shapes, then a model, then all of ``pytest -m cuda``."""
    return {
        **_shapes(kernels.SHAPES, dtype),
        "check of a ViT, float32": _of_a_model(on_device.check_passes, torch.float32),
        "check of a ViT, bfloat16": _of_a_model(on_device.check_passes, torch.bfloat16),
        **on_device.CASES,
        "gradients of a ViT": _of_a_model(on_device.gradients_of_a_model),
        "gradients under autocast": _of_a_model(on_device.gradients_under_autocast),
        "CUDA graphs replay": _of_a_model(on_device.cuda_graphs_replay),
    }


def tiny_cases(dtype: torch.dtype) -> dict[str, Case]:
    """What Triton's interpreter gets through in seconds."""
    del dtype  # products of bfloat16 are cut off where a device rounds
    return {**_shapes(kernels.TINY, torch.float32), **on_device.TINY_CASES}


def _shapes(shapes: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Case]:
    def case(name: str, device: str) -> None:
        row = kernels.correct_at(name, shapes[name], dtype, torch.device(device))
        assert row["right"] == "yes", str(row)

    return {f"kernels at the shape {name}": partial(case, name) for name in shapes}


def _of_a_model(case: Callable[..., None], dtype: torch.dtype = torch.float32) -> Case:
    def run(device: str) -> None:
        torch.compiler.reset()
        model = TINY.model().to(device, dtype)
        case(model, {"pixel_values": TINY.images(torch.device(device), dtype)})

    return run
