"""All that is to be known of an NVIDIA GPU, in commands of some minutes each.

    python -m benchmarks gpu --only kernels
    python -m benchmarks gpu --only vit_b --r 16 --mode max-autotune

Models come from configurations with random weights: no network, no data folder. Each command
writes its own table and JSON (``gpu_NAME_MODE_rN_DTYPE.json``, mode and r where it
has them). With ``--tiny`` everything runs on a tiny model,
and on a CPU in Triton's interpreter where no GPU is at hand: that says what works, not how fast.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import tomepass
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu.models import SETTINGS, TINY, TRAINING, Setting
from benchmarks.gpu.options import options_of, verdict
from benchmarks.gpu.profile import profiled
from benchmarks.gpu.timing import milliseconds
from benchmarks.results import OUT, Results
from tomepass import ToMe, TomeBackend
from tomepass.cli.options import parse_dtype
from tomepass.measuring.measure import measure
from tomepass.measuring.memory import peak_tensor_bytes

MODES = ("default", "reduce-overhead", "max-autotune")

NAMES = (
    *(*SETTINGS, "training", "memory", "profile", "plan"),
    *("check", "kernels", "bandwidth", "attention", "attention_72"),
)


COMPILED = (*SETTINGS, "training", "profile", "plan")
"""Parts whose figures depend on Inductor's mode."""


Rows = list[dict[str, Any]]


def main(
    only: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "kernels",
    mode: Annotated[str, typer.Option(help=f"Of Inductor: {', '.join(MODES)}.")] = "max-autotune",
    r: Annotated[int | None, typer.Option(help="One of a setting's counts; all of them.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model, anywhere.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Measure one part of the GPU benchmark and write its table."""
    if only not in NAMES:
        raise typer.BadParameter(f"--only takes {', '.join(NAMES)}, got {only!r}")
    if mode not in MODES:
        raise typer.BadParameter(f"--mode takes {', '.join(MODES)}, got {mode!r}")
    counts = (TINY if tiny else SETTINGS[only]).counts if only in SETTINGS else ()
    if r is not None and r not in counts:
        raise typer.BadParameter(f"--r with --only {only} takes one of {list(counts)}, got {r}")
    if not (torch.cuda.is_available() or tiny):
        raise typer.BadParameter("no CUDA device here; --tiny runs everything small on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"only": only, "mode": mode, "r": r, "dtype": dtype, "rounds": rounds, "tiny": tiny}
    rows = measured(only, mode, r, parse_dtype(dtype), rounds, device, tiny)
    if tiny:  # of a tiny model no figure is a verdict
        rows = [row | {"reached": "-"} if "reached" in row else row for row in rows]
    columns = {name: _shown(name) for name in rows[0]}
    told: dict[str, Any] = {"mode": mode if only in COMPILED else None, "r": r, "dtype": dtype}
    words = [f"--only {only}", *(f"--{k} {v}" for k, v in told.items() if v is not None)]
    words += [f"--rounds {rounds}", *(["--tiny"] if tiny else [])]
    where = {"command": " ".join(["python -m benchmarks gpu", *words]), **versions(device)}
    settings |= where
    # A file a command: none writes over another's.
    parts = [f"r{r}" if key == "r" else value for key, value in told.items() if value is not None]
    parts += ["tiny"] * tiny
    name = "_".join(["gpu", only, *parts])
    Results(
        name=name,
        title=f"{', '.join([only, *parts])}, {device_name(device)}",
        columns=columns,
        rows=rows,
        settings=settings,
        plot=None,
        note="; ".join(f"{key}: {value}" for key, value in where.items()),
    ).publish(out)
    # Terminals cut wide tables.
    typer.echo((out / f"{name}.md").read_text())


def measured(
    only: str,
    mode: str,
    r: int | None,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
    tiny: bool,
) -> Rows:
    """The rows of one part."""
    if only in SETTINGS:
        setting = TINY if tiny else SETTINGS[only]
        counts = setting.counts if r is None else (r,)
        return [compared(setting, count, mode, dtype, rounds, device) for count in counts]
    setting = TINY if tiny else SETTINGS["vit_b"]
    parts: dict[str, Callable[[], Rows]] = {
        "training": lambda: trained(TINY if tiny else TRAINING, mode, dtype, rounds, device),
        "memory": lambda: memory(setting, TINY if tiny else TRAINING, dtype, device),
        "profile": lambda: profiled(setting, mode, dtype, rounds, device),
        "plan": lambda: planned(TINY if tiny else SETTINGS["batch1"], mode, dtype, rounds, device),
        "check": lambda: checked(setting, dtype, device),
        "kernels": lambda: gpu_kernels.correct(dtype, device, tiny),
        "bandwidth": lambda: gpu_kernels.bandwidth(dtype, rounds, device, tiny),
        "attention": lambda: gpu_kernels.attention(64, dtype, rounds, device, tiny),
        "attention_72": lambda: gpu_kernels.attention(72, dtype, rounds, device, tiny),
    }
    return parts[only]()


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
    import shutil
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout.split() or ["unknown"])[0]


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor | None = getattr(output, "logits", None)
    first: Tensor = output[0] if found is None else found
    return first


def _number(figure: Any) -> Any:
    return float(figure) if isinstance(figure, (int, float)) else str(figure)


def _shown(name: str) -> Callable[[Any], str]:
    def show(row: Any) -> str:
        value = row[name]
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return show
