"""Compiled against compiled: a model and its merged form under one backend, in one process.

Rounds are interleaved and swap their order, so that a machine that grows slower or faster
during the run weighs on both alike; ratios are taken round by round.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tomepass.errors import TomeError, compiling_merged
from tomepass.handover.added import captured
from tomepass.handover.applying import apply
from tomepass.handover.choices import check_one_graph
from tomepass.handover.compiling.backend import options_of
from tomepass.handover.compiling.inner import Inner, inner_name, resolve_inner
from tomepass.handover.merged import MergedModel, asked_of, call_of
from tomepass.handover.refusing import check_model
from tomepass.measuring.memory import peak_tensor_bytes
from tomepass.measuring.values import Arm, Measurement, Settings, Spread
from tomepass.methods import MethodLike, RLike
from tomepass.model.batches import first_of
from tomepass.model.calls import call_with
from tomepass.model.unmerged import check_values, the_models_own

# One sample lasts at least this long: below it, timer and launch noise show.
_SAMPLE_SECONDS = 0.1


_MOST_CALLS = 1000

_WARM_CALLS = 2

_STAGES = 4  # capture, two compilations, memory


def measure(
    model: nn.Module,
    inputs: Any,
    method: MethodLike | None = None,
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
        inputs: a tensor, a tuple or a dict, as for :func:`tomepass.apply`. The first
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
    model, method = asked_of(model, method, r)
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
    first = first_of(call)
    assert first is not None
    with torch.no_grad(), _dynamo_of_its_own(), _marks_restored(model):
        forms = _forms(model, merged, call, first.device, inner, backend)
        timed = _in_turns(forms, rounds, lambda: _compiling(inner, options, cold), say)
    return Measurement(
        settings=Settings(
            model=label or type(model).__name__,
            method=method,
            dtype=_dtype_name(model, first),
            batch=first.shape[0],
            inner=inner_name(inner),
            inner_options=tuple(sorted(options.items())),
            device=first.device.type,
            threads=torch.get_num_threads(),
            rounds=rounds,
            calls=timed.calls,
            cold=cold and inner == "inductor",
        ),
        original=timed.arm(0, first.shape[0]),
        merged=timed.arm(1, first.shape[0]),
        ratio=timed.ratio,
        ratio_ideal=captured(merged, inputs).report.speedup_ideal,
        apply_seconds=apply_seconds,
    )


@dataclass(frozen=True)
class _Form:
    """The model, or its merged form, as a call that is compiled when it is first made.

    Args:
        name: for messages.
        run: the call.
        device: on which it runs.
        fault: in force around each call: makes an error of one that says whose it is.
    """

    name: str
    run: Callable[[], Any]
    device: torch.device
    fault: Callable[[], contextlib.AbstractContextManager[None]]

    def first_call(self, compiling: contextlib.AbstractContextManager[None]) -> float:
        """Compiles it: the seconds that took."""
        with compiling, self.fault():
            return _first_call(self.run, self.device)

    def seconds(self, calls: int) -> float:
        """Seconds a call."""
        with self.fault():
            return seconds_a_call(self.run, calls, self.device)

    def peak_bytes(self) -> int:
        """Memory of a call."""
        with self.fault():
            return peak_tensor_bytes(self.run, self.device)


@dataclass(frozen=True)
class _Timed:
    """What was measured of both forms, the original first.

    Args:
        compile_seconds: of each.
        peaks: bytes of each.
        calls: a sample.
        samples: seconds a call of each, in each round.
    """

    compile_seconds: Sequence[float]
    peaks: Sequence[int]
    calls: int
    samples: tuple[list[float], list[float]]

    def arm(self, index: int, batch: int) -> Arm:
        """One form's figures, in milliseconds an image."""
        times = tuple(1000.0 * s / batch for s in self.samples[index])
        return Arm(Spread(times), self.peaks[index], self.compile_seconds[index])

    @property
    def ratio(self) -> Spread:
        """Unmerged over merged, round by round."""
        return Spread(tuple(a / b for a, b in zip(*self.samples, strict=True)))


def _forms(
    model: nn.Module,
    merged: MergedModel,
    call: dict[str, Any],
    device: torch.device,
    inner: Inner,
    backend: Any,
) -> tuple[_Form, _Form]:
    """Both forms. What the model raises, or a backend that cannot compile it, is no fault of
    merging."""
    reason = f"compiled by the backend {inner_name(inner)!r} raises"
    original: Any = torch.compile(model, backend=backend)
    compiled: Any = torch.compile(merged, backend=backend, fullgraph=True)
    return (
        _Form(
            "the original",
            lambda: call_with(original, call),
            device,
            lambda: the_models_own(model, call, reason),
        ),
        _Form(
            "the merged form",
            lambda: call_with(compiled, call),
            device,
            lambda: compiling_merged(inner_name(inner)),
        ),
    )


def _in_turns(
    forms: tuple[_Form, _Form],
    rounds: int,
    compiling: Callable[[], contextlib.AbstractContextManager[None]],
    say: Callable[[str], None],
) -> _Timed:
    """Compiles both forms, then times them in rounds that swap their order."""
    compile_seconds = []
    for form in forms:
        say(f"compiling {form.name}")
        compile_seconds.append(form.first_call(compiling()))
    say("warming up, measuring memory")
    warm = min(form.seconds(1) for form in forms for _ in range(_WARM_CALLS))
    calls = min(max(math.ceil(_SAMPLE_SECONDS / warm), 1), _MOST_CALLS)
    samples: tuple[list[float], list[float]] = ([], [])
    with torch.compiler.set_stance("fail_on_recompile"):
        peaks = [form.peak_bytes() for form in forms]
        for index in range(rounds):
            say(f"round {index + 1} of {rounds}")
            for arm in (0, 1) if index % 2 == 0 else (1, 0):
                samples[arm].append(forms[arm].seconds(calls))
    return _Timed(compile_seconds, peaks, calls, samples)


def check_rounds(rounds: object) -> None:
    """Refuses what counts no rounds.

    Raises:
        TypeError, ValueError: if it is no int of 1 or more.
    """
    if not isinstance(rounds, int):
        raise TypeError(f"rounds counts samples: expected an int, got {rounds!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")


def steps(rounds: int) -> int:
    """How often :func:`measure` calls ``progress``."""
    return _STAGES + rounds


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


def _dtype_name(model: nn.Module, fallback: Tensor) -> str:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(dtypes, fallback.dtype)).removeprefix("torch.")


def _silent(_: str) -> None:
    return None
