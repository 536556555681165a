"""Compiled against compiled: a model and its merged form under one backend, in one process.

Rounds are interleaved and swap their order, so that a machine that grows slower or faster
during the run weighs on both alike; ratios are taken round by round.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.backend import Inner, options_of, resolve_inner
from tomepass.calls import call_with
from tomepass.errors import TomeError, compiling_merged
from tomepass.methods import Method, RLike, ToMe, method_from_dict, resolve_method
from tomepass.module import MergedModel, apply, call_of, captured, check_model, check_one_graph
from tomepass.unmerged import check_values, the_models_own

if TYPE_CHECKING:
    from rich.console import RenderableType

Environment = dict[str, Any]

# One sample lasts at least this long: below it, timer and launch noise show.
_SAMPLE_SECONDS = 0.1
_MOST_CALLS = 1000
_WARM_CALLS = 2
_STAGES = 4  # capture, two compilations, memory


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one figure, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the two in the middle."""
        return self.quantile(0.5)

    @property
    def low(self) -> float:
        """The smallest sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The largest sample."""
        return max(self.samples)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the samples lie, interpolated linearly."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        return below + (place - math.floor(place)) * (above - below)

    def to_dict(self) -> dict[str, Any]:
        """Median, minimum, maximum, quartiles and the samples themselves."""
        return {
            "median": self.median,
            "min": self.low,
            "max": self.high,
            "q1": self.quantile(0.25),
            "q3": self.quantile(0.75),
            "samples": list(self.samples),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Spread:
        """What :meth:`to_dict` wrote."""
        return Spread(tuple(data["samples"]))


@dataclass(frozen=True)
class Settings:
    """What was measured, and how.

    Args:
        model: a label.
        method: what the merged form merges.
        dtype: of the weights, for example ``"bfloat16"``.
        batch: images a call.
        inner: the backend that compiled both.
        inner_options: its options, sorted by name.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of PyTorch, within one operator.
        rounds: samples of each form.
        calls: calls a sample.
        cold: were both compiled with empty compiler caches?
    """

    model: str
    method: Method
    dtype: str
    batch: int
    inner: str
    inner_options: tuple[tuple[str, Any], ...]
    device: str
    threads: int
    rounds: int
    calls: int
    cold: bool

    @property
    def method_label(self) -> str:
        """``8``, ``(13, -1.0)``: the schedule alone where that says all, else the whole method."""
        schedule = self.method.schedule
        if self.method != ToMe(schedule):
            return repr(self.method)
        return repr(schedule).removeprefix("r=")

    @property
    def options_label(self) -> str:
        """``freezing``, ``no freezing``, ``max_autotune, epilogue_fusion=…``; empty for none."""
        words = []
        for name, value in self.inner_options:
            if isinstance(value, bool):
                words.append(name if value else f"no {name}")
            else:
                words.append(f"{name}={value}")
        return ", ".join(words)

    @property
    def title(self) -> str:
        """What measurements in one plot share: ``vit_base, bfloat16, batch 16, inductor``."""
        return f"{self.model}, {self.dtype}, batch {self.batch}, {self.inner}"

    @property
    def where(self) -> str:
        """``cpu, 2 threads`` or ``cuda``."""
        return f"cpu, {threads_named(self.threads)}" if self.device == "cpu" else self.device

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {
            "method": self.method.to_dict(),
            "inner_options": dict(self.inner_options),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Settings:
        """What :meth:`to_dict` wrote."""
        return Settings(
            **{
                **data,
                "method": method_from_dict(data["method"]),
                "inner_options": tuple(sorted(data["inner_options"].items())),
            }
        )


@dataclass(frozen=True)
class Arm:
    """One form of the model, original or merged, compiled.

    Args:
        milliseconds: an image.
        peak_bytes: the most tensor memory a call holds beyond weights and inputs.
        compile_seconds: the first call, which compiles.
    """

    milliseconds: Spread
    peak_bytes: int
    compile_seconds: float

    @property
    def images_per_second(self) -> float:
        """At the median time."""
        return 1000.0 / self.milliseconds.median

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "milliseconds": self.milliseconds.to_dict(),
            "images_per_second": self.images_per_second,
            "peak_bytes": self.peak_bytes,
            "compile_seconds": self.compile_seconds,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Arm:
        """What :meth:`to_dict` wrote."""
        return Arm(
            Spread.from_dict(data["milliseconds"]), data["peak_bytes"], data["compile_seconds"]
        )


@dataclass(frozen=True)
class Measurement:
    """The original and the merged form of a model, side by side.

    Args:
        settings: what was measured, and how.
        original: the model, compiled.
        merged: its merged form, compiled by the same backend.
        ratio: original time over merged time, round by round; above 1 merging is faster.
        ratio_ideal: the same by multiply-accumulates alone, from the report.
        apply_seconds: capturing and rewriting, before any compilation.
    """

    settings: Settings
    original: Arm
    merged: Arm
    ratio: Spread
    ratio_ideal: float
    apply_seconds: float

    @property
    def memory_ratio(self) -> float:
        """Original peak over merged peak; above 1 merging needs less."""
        return self.original.peak_bytes / max(self.merged.peak_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with the derived figures."""
        return {
            "settings": self.settings.to_dict(),
            "original": self.original.to_dict(),
            "merged": self.merged.to_dict(),
            "ratio": self.ratio.to_dict(),
            "ratio_ideal": self.ratio_ideal,
            "memory_ratio": self.memory_ratio,
            "apply_seconds": self.apply_seconds,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measurement:
        """What :meth:`to_dict` wrote."""
        return Measurement(
            settings=Settings.from_dict(data["settings"]),
            original=Arm.from_dict(data["original"]),
            merged=Arm.from_dict(data["merged"]),
            ratio=Spread.from_dict(data["ratio"]),
            ratio_ideal=data["ratio_ideal"],
            apply_seconds=data["apply_seconds"],
        )


# ---- measuring -----------------------------------------------------------------------------


def measure(
    model: nn.Module,
    inputs: Any,
    method: Method | None = None,
    *,
    r: RLike | None = None,
    inner: Inner = "inductor",
    inner_options: Mapping[str, Any] | None = None,
    rounds: int = 10,
    cold: bool = False,
    label: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Measurement:
    """Compiles a model and its merged form with one backend and times them in turns.

    Both run under ``torch.no_grad()``. What the process had compiled is forgotten, before and
    after (``torch._dynamo.reset()``); nothing else outside changes.

    Args:
        model: the model, in eval mode, on the CPU or a CUDA device; or an applied one.
        inputs: a tensor, a tuple or a dict, as for :meth:`MergedModel.prepare`. The first
            dimension of the first tensor is the batch.
        method: as in :func:`tomepass.apply`.
        r: short for ``method=ToMe(r=r)``.
        inner: the backend that compiles both, as in :class:`TomeBackend`.
        inner_options: its options. Inductor's ``{"freezing": True}`` takes effect here.
        rounds: samples of each form.
        cold: compile with empty compiler caches, so that ``compile_seconds`` says what a fresh
            machine would need. Inductor only.
        label: what to call the model; its class by default.
        progress: called with a word on each of :func:`steps` steps before it is made.

    Raises:
        TomeError: if the model cannot be merged, is in training mode, lives on another kind of
            device, the method or model is adaptive, or the backend or one of Inductor's options is
            not known; if the model itself, compiled by that backend, raises for these inputs, which
            is then its cause; or if one of the two still recompiles after warming up.
        TypeError, ValueError: on options or ``rounds`` of a wrong type, or fewer rounds than 1.
    """
    if isinstance(model, MergedModel):
        if method is None and r is None:
            method = model._tome.method
        model = model._tome.model
    method = resolve_method(method, r)
    check_model(model)
    check_one_graph(method, "measure")
    options = options_of(inner_options)
    _refuse(model, inner, options, rounds)
    backend = resolve_inner(inner, options)
    check_values(model, call_of(model, inputs), "measuring")
    say = progress or _silent

    say("capturing and rewriting")
    started = time.perf_counter()
    merged = apply(model, method, example_inputs=inputs)
    apply_seconds = time.perf_counter() - started
    call = merged._tome.call_of(inputs)
    leaves = [v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.ndim]
    device, batch = leaves[0].device, leaves[0].shape[0]

    def whose(form: nn.Module) -> contextlib.AbstractContextManager[None]:
        """What the model raises, or a backend that cannot compile it, is no fault of merging."""
        if form is merged:
            return compiling_merged(inner_name(inner))
        return the_models_own(model, call, f"compiled by the backend {inner_name(inner)!r} raises")

    forms = (("the original", model), ("the merged form", merged))
    runs: list[Callable[[], Any]] = []
    compile_seconds = []
    with torch.no_grad(), _dynamo_of_its_own(), _marks_restored(model):
        for name, form in forms:
            say(f"compiling {name}")
            compiled: Any = torch.compile(form, backend=backend, fullgraph=form is merged)
            runs.append(_bound(compiled, call))
            with _compiling(inner, options, cold), whose(form):
                compile_seconds.append(_first_call(runs[-1], device))
        say("warming up, measuring memory")
        warm = math.inf
        for run, (_, form) in zip(runs, forms, strict=True):
            with whose(form):
                warm = min(warm, *(seconds_a_call(run, 1, device) for _ in range(_WARM_CALLS)))
        calls = min(max(math.ceil(_SAMPLE_SECONDS / warm), 1), _MOST_CALLS)
        with torch.compiler.set_stance("fail_on_recompile"):
            peaks = []
            for run, (_, form) in zip(runs, forms, strict=True):
                with whose(form):
                    peaks.append(peak_tensor_bytes(run, device))
            samples: list[list[float]] = [[], []]
            for index in range(rounds):
                say(f"round {index + 1} of {rounds}")
                for arm in (0, 1) if index % 2 == 0 else (1, 0):
                    with whose(forms[arm][1]):
                        samples[arm].append(seconds_a_call(runs[arm], calls, device))

    arms = [
        Arm(Spread(tuple(1000.0 * s / batch for s in times)), peak, seconds)
        for times, peak, seconds in zip(samples, peaks, compile_seconds, strict=True)
    ]
    return Measurement(
        settings=Settings(
            model=label or type(model).__name__,
            method=method,
            dtype=_dtype_name(model, leaves[0]),
            batch=batch,
            inner=inner_name(inner),
            inner_options=tuple(sorted(options.items())),
            device=device.type,
            threads=torch.get_num_threads(),
            rounds=rounds,
            calls=calls,
            cold=cold and inner == "inductor",
        ),
        original=arms[0],
        merged=arms[1],
        ratio=Spread(tuple(a / b for a, b in zip(*samples, strict=True))),
        ratio_ideal=captured(merged, inputs).report.speedup_ideal,
        apply_seconds=apply_seconds,
    )


def check_rounds(rounds: object) -> None:
    """Refuses what counts no rounds.

    Raises:
        TypeError, ValueError: if it is no int of 1 or more.
    """
    if not isinstance(rounds, int):
        raise TypeError(f"rounds counts samples: expected an int, got {rounds!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")


def inner_name(inner: Inner) -> str:
    """A backend as tables and files call it."""
    return inner if isinstance(inner, str) else getattr(inner, "__name__", "callable")


def steps(rounds: int) -> int:
    """How often :func:`measure` calls ``progress``."""
    return _STAGES + rounds


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


def environment() -> Environment:
    """What figures depend on: versions, processor, threads. No host names, no paths."""
    from importlib.metadata import version

    from tomepass import __version__

    found: Environment = {
        "tomepass": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": _cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


# ---- reporting -----------------------------------------------------------------------------


def to_json(measurements: Sequence[Measurement], environment: Environment) -> str:
    """One JSON object: ``environment`` and ``measurements``, the samples included."""
    data = {
        "environment": environment,
        "measurements": [measurement.to_dict() for measurement in measurements],
    }
    return json.dumps(data, indent=1)


def from_json(text: str) -> tuple[list[Measurement], Environment]:
    """What :func:`to_json` wrote."""
    data = json.loads(text)
    return [Measurement.from_dict(m) for m in data["measurements"]], data["environment"]


def bench_table(measurements: Sequence[Measurement], environment: Environment) -> RenderableType:
    """For rich to print: a table for each model, dtype, batch, backend, options and device."""
    from rich.console import Group
    from rich.text import Text

    from tomepass.tables import table

    groups: dict[str, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault(_table_title(m.settings), []).append(m)
    parts: list[RenderableType] = []
    for title, group in groups.items():
        made = table(title, "r", "images/s", "speed-up", "ideal", "peak MB", "compile s")
        made.columns[0].no_wrap = True
        for m in group:
            made.add_row(*_row(m))
        parts.append(made)
    if measurements:
        parts.append(Text(_legend(measurements)))
    parts.append(Text(describe(environment)))
    return Group(*parts)


def describe(environment: Environment) -> str:
    """An environment in one line: ``torch 2.13.0, transformers 5.23.0, … AMD EPYC, 2 threads``."""
    versions = ("tomepass", "torch", "transformers", "python", "cuda")
    words = [f"{name} {environment[name]}" for name in versions if name in environment]
    words += [str(environment[name]) for name in ("gpu", "cpu") if name in environment]
    if "cpu_capability" in environment:
        words[-1] += f" ({environment['cpu_capability']})"
    if "threads" in environment:
        words.append(threads_named(environment["threads"]))
    return ", ".join(words)


def threads_named(count: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} thread{'s' * (count != 1)}"


def machine(settings: Settings, environment: Environment) -> str:
    """The processor a measurement was made on: ``AMD EPYC (AVX512), 2 threads, torch 2.13.0``."""
    if settings.device == "cpu":
        words = [environment.get("cpu", "cpu"), threads_named(settings.threads)]
        if "cpu_capability" in environment:
            words[0] += f" ({environment['cpu_capability']})"
    else:
        words = [environment.get("gpu", settings.device)]
    if "torch" in environment:
        words.append(f"torch {environment['torch']}")
    return ", ".join(words)


def _table_title(settings: Settings) -> str:
    options = f" ({settings.options_label})" if settings.options_label else ""
    return f"{settings.title}{options}, {settings.where}"


def _row(m: Measurement) -> tuple[str, ...]:
    before, after = m.original, m.merged
    return (
        m.settings.method_label,
        f"{_short(before.images_per_second)} -> {_short(after.images_per_second)}",
        f"{m.ratio.median:.2f}x ({m.ratio.low:.2f}-{m.ratio.high:.2f})",
        f"{m.ratio_ideal:.2f}x",
        f"{_short(before.peak_bytes / 1e6)} -> {_short(after.peak_bytes / 1e6)}",
        f"{before.compile_seconds:.0f} -> {after.compile_seconds:.0f}",
    )


def _legend(measurements: Sequence[Measurement]) -> str:
    rounds = sorted({m.settings.rounds for m in measurements})
    cold = {m.settings.cold for m in measurements}
    caches = "empty compiler caches" if cold == {True} else "compiler caches as they were"
    return (
        f"Unmerged -> merged, both compiled; medians of {' or '.join(map(str, rounds))} "
        "interleaved rounds. Speed-up: the median, least and greatest ratio of a round; ideal: "
        "by multiply-accumulates alone. Peak: the tensors a call holds beyond weights and "
        f"inputs. Compile: the first call, with {caches}."
    )


def _short(value: float) -> str:
    """Three digits: ``0.123``, ``1.23``, ``12.3``, ``123``."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 4)}f}"


# ---- details -------------------------------------------------------------------------------


def _refuse(model: nn.Module, inner: Inner, options: Mapping[str, Any], rounds: int) -> None:
    check_rounds(rounds)
    if model.training:
        raise TomeError(
            "inference is measured, and the model is in training mode",
            advice="call model.eval() first",
        )
    if other := {p.device.type for p in model.parameters()} - {"cpu", "cuda"}:
        raise TomeError(f"measuring works on cpu and cuda, the model is on {sorted(other)}")
    if inner == "inductor":
        import torch._inductor.config as inductor

        if unknown := sorted(set(options) - set(inductor.get_config_copy())):
            raise TomeError(f"Inductor has no option {', '.join(map(repr, unknown))}")


@contextlib.contextmanager
def _compiling(inner: Inner, options: dict[str, Any], cold: bool) -> Iterator[None]:
    """Inductor's options in force while Dynamo traces too, and empty caches if asked for.

    Dynamo asks Inductor's global configuration whether to keep parameters as constants
    (``freezing``) before any backend is called. Options that only the backend sees come too
    late: Inductor then finds no parameter to freeze, and says nothing.
    """
    with contextlib.ExitStack() as stack:
        if inner == "inductor":
            import torch._inductor.config as inductor
            from torch._inductor.utils import fresh_cache

            stack.enter_context(inductor.patch(options))
            if cold:
                stack.enter_context(fresh_cache())
        yield


@contextlib.contextmanager
def _dynamo_of_its_own() -> Iterator[None]:
    """Forgets compiled code before and after.

    Dynamo compiles one code object eight times at most and then runs it uncompiled, and all
    applied models share one ``forward``.
    """
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


@contextlib.contextmanager
def _marks_restored(model: nn.Module) -> Iterator[None]:
    """Takes back the marks that compilation leaves on parameters and buffers.

    Those of a frozen compilation would decide how the next one, unfrozen, treats them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    before = [dict(tensor.__dict__) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, marks in zip(tensors, before, strict=True):
            tensor.__dict__.clear()
            tensor.__dict__.update(marks)


def _bound(compiled: Callable[..., Any], call: dict[str, Any]) -> Callable[[], Any]:
    return lambda: call_with(compiled, call)


def _first_call(run: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def seconds_a_call(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Wall-clock seconds a call; on CUDA between two events on the current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000.0 / calls
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


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


def _dtype_name(model: nn.Module, fallback: Tensor) -> str:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(dtypes, fallback.dtype)).removeprefix("torch.")


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_capability() -> str:
    """The widest vector instructions there are, and whether there are matrix ones."""
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{widest}, AMX" if torch.cpu._is_amx_tile_supported() else widest


def _silent(_: str) -> None:
    return None
