"""Whole models on a device, merged against unmerged: calls, training steps, memory, the planner."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tomepass
from benchmarks.gpu.models import Setting
from benchmarks.gpu.options import options_of, verdict
from benchmarks.gpu.timing import milliseconds
from tomepass import ToMe, TomeBackend
from tomepass.measuring.measure import measure
from tomepass.measuring.memory import peak_tensor_bytes

Rows = list[dict[str, Any]]


def compared(
    setting: Setting, r: Any, mode: str, dtype: torch.dtype, rounds: int, device: torch.device
) -> dict[str, Any]:
    """A model against its merged form, compiled alike, in turns."""
    model = setting.model().to(device, dtype)
    images = setting.images(device, dtype)
    options = options_of(mode) if device.type == "cuda" else {}
    found = measure(model, images, r=r, inner_options=options, rounds=rounds)
    ideal, ratio = found.ratio_ideal, found.ratio
    goal = setting.target or 1 / ideal
    return {
        "r": str(r),
        "batch": setting.batch,
        "speed-up": ratio.median,
        "least": ratio.low,
        "greatest": ratio.high,
        "MAC-ideal": ideal,
        "of ideal": ratio.median / ideal,
        "to reach": goal,
        "reached": verdict(ratio.median / ideal >= goal),
        "ms unmerged": found.original.milliseconds.median * setting.batch,
        "ms merged": found.merged.milliseconds.median * setting.batch,
        "s to compile": found.merged.compile_seconds,
        "kernels": "; ".join(tomepass.explain(model, r=r, example_inputs=images).kernels),
    }


def planned(
    setting: Setting, mode: str, dtype: torch.dtype, rounds: int, device: torch.device
) -> Rows:
    """What the planner says: a schedule, or that merging does not pay."""
    model = setting.model().to(device, dtype)
    (r,) = setting.counts
    options = options_of(mode) if device.type == "cuda" else {}
    images = setting.images(device, dtype)
    plan = tomepass.plan(model, images, r=r, inner_options=options, rounds=rounds, progress=False)
    return [
        {
            "r": str(r),
            "batch": setting.batch,
            "tried": ", ".join(f"{t.speedup:.2f}x" for t in plan.tried),
            "merges": "yes" if plan.merges else "no",
            "why": plan.why,
            "reached": verdict((plan.speedup or 0) >= 1 or not plan.merges),
        }
    ]


def trained(
    setting: Setting, mode: str, dtype: torch.dtype, rounds: int, device: torch.device
) -> Rows:
    """Forward and backward of both forms, compiled alike, in turns."""
    images = setting.images(device, dtype)
    (r,) = setting.counts
    options = options_of(mode) if device.type == "cuda" else {}
    runs = [
        training_step(setting.model().to(device, dtype), form, images, options)
        for form in (None, ToMe(r))
    ]
    times = milliseconds(runs, rounds, device)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    goal = 1.6
    return [
        {
            "r": str(r),
            "batch": setting.batch,
            "speed-up": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
            "to reach": goal,
            "reached": verdict(statistics.median(ratios) >= goal),
            "ms unmerged": statistics.median(times[0]),
            "ms merged": statistics.median(times[1]),
        }
    ]


def training_step(
    model: nn.Module, method: ToMe | None, images: Tensor, options: dict[str, Any]
) -> Callable[[], Any]:
    """A call that makes all gradients, as a step of training without its optimizer."""
    model.train().requires_grad_(True)
    if method is not None:
        # Its graph is captured for training mode, then compiled as any module is.
        model = tomepass.apply(model, method, example_inputs=images)
    backend = TomeBackend(None, inner_options=options)
    compiled: Any = torch.compile(model, backend=backend)

    def step() -> None:
        loss: Any = _tensor(compiled(images)).float().square().mean()
        loss.backward()
        # None is left over from one call to the next: a call's memory counts its gradients.
        model.zero_grad(set_to_none=True)

    return step


def memory(inference: Setting, training: Setting, dtype: torch.dtype, device: torch.device) -> Rows:
    """Peak memory of a call beyond weights and inputs, without CUDA graphs, whose pools hide it."""
    rows = []
    for name, setting in (("inference", inference), ("training", training)):
        images, r, found = setting.images(device, dtype), setting.counts[-1], []
        for method in (None, ToMe(r)):
            torch.compiler.reset()
            model = setting.model().to(device, dtype)
            if name == "training":
                run = training_step(model, method, images, {})
            else:
                run = inference_call(model, method, images)
            for _ in range(3):
                run()
            found.append(peak_tensor_bytes(run, device))
        ratio, goal = found[1] / max(found[0], 1), 1.0 if name == "inference" else 0.75
        rows.append(
            {
                "what": name,
                "r": str(r),
                "batch": setting.batch,
                "MB unmerged": found[0] / 1e6,
                "MB merged": found[1] / 1e6,
                "ratio": ratio,
                "to reach": goal,
                "reached": verdict(ratio <= goal),
            }
        )
    return rows


def inference_call(model: nn.Module, method: ToMe | None, images: Tensor) -> Callable[[], Any]:
    """A compiled call without gradients."""
    form = model if method is None else tomepass.apply(model, method, example_inputs=images)
    compiled: Any = torch.compile(form, backend=TomeBackend(None))

    def run() -> Any:
        with torch.no_grad():
            return compiled(images)

    return run


def checked(setting: Setting, dtype: torch.dtype, device: torch.device) -> Rows:
    """``tomepass.check`` of a model, on a small batch."""
    model = setting.model().to(device, dtype)
    images = setting.images(device, dtype)[:4]
    rows = []
    for r in setting.counts:
        report = tomepass.check(copy.deepcopy(model), images, r=r)
        verdicts = {True: "pass", False: "FAIL", None: "-"}
        rows += [
            {
                "r": str(r),
                "check": line.name.strip(),
                "figure": _number(line.figure),
                "verdict": verdicts[line.passed],
            }
            for line in report.lines
        ]
    return rows


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor | None = getattr(output, "logits", None)
    first: Tensor = output[0] if found is None else found
    return first


def _number(figure: Any) -> Any:
    return float(figure) if isinstance(figure, (int, float)) else str(figure)
