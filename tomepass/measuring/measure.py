"""Compiled against compiled: a model and its merged form under one backend, in one process.

Rounds are interleaved and swap their order, so that a machine that grows slower or faster
during the run weighs on both alike; ratios are taken round by round.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.errors import TomeError, compiling_merged
from tomepass.handover.added import captured
from tomepass.handover.applying import apply
from tomepass.handover.choices import check_one_graph
from tomepass.handover.compiling.backend import options_of
from tomepass.handover.compiling.inner import Inner, inner_name, resolve_inner
from tomepass.handover.merged import call_of, of_one_graph
from tomepass.handover.refusing import check_model
from tomepass.measuring.memory import peak_tensor_bytes
from tomepass.measuring.values import Arm, Measurement, Settings, Spread
from tomepass.methods import MethodLike, RLike
from tomepass.methods.asked import resolve_method
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
    standing = None
    if of_one_graph(model):
        standing, model = model._tome.method, model._tome.model
    method = resolve_method(method, r, standing=standing)
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


def _dtype_name(model: nn.Module, fallback: Tensor) -> str:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(dtypes, fallback.dtype)).removeprefix("torch.")


def _silent(_: str) -> None:
    return None
