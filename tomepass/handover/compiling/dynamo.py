"""Finds out about the call of a compiled function during which a backend is asked to compile.

The backend warns once a call has ended without any graph that has attention. Dynamo tells a
backend neither when a call ends nor when it gives up compiling, so both are read off the stack
frame of the call and the number of the compilation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._guards import CompileContext

_CALLS = "/torch/_dynamo/eval_frame.py"


@dataclass(frozen=True)
class CompiledCall:
    """A call of something compiled, under way.

    Args:
        subject: the module or function given to ``torch.compile``.
        cleanups: what Dynamo runs when the call ends, whatever its end.
    """

    subject: Any
    cleanups: list[Callable[[], Any]]

    def at_its_end(self, then: Callable[[], None]) -> None:
        """Has ``then`` called once the call has returned; not if it raised."""

        def returned() -> None:
            if sys.exc_info()[1] is None:
                then()

        self.cleanups.append(returned)


def compiled_call() -> CompiledCall | None:
    """The outermost call of something compiled in this thread; None where it cannot be told."""
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        if frame.f_code.co_filename.endswith(_CALLS) and "cleanups" in frame.f_code.co_varnames:
            found = frame
        frame = frame.f_back
    held = {} if found is None else found.f_locals
    function, cleanups = held.get("fn"), held.get("cleanups")
    if function is None or not isinstance(cleanups, list):
        return None
    return CompiledCall(subject_of(function), cleanups)


def subject_of(compiled: Any) -> Any:
    """What was given to ``torch.compile`` to make this; the thing itself if nothing was."""
    while not isinstance(compiled, nn.Module) or "_orig_mod" in compiled._modules:
        # A compiled module; a method; a compiled function; a module of torch's own, which Dynamo
        # calls through a function.
        for name in ("_orig_mod", "__self__", "_torchdynamo_orig_callable", "__wrapped__"):
            if (inside := getattr(compiled, name, None)) is not None:
                compiled = inside
                break
        else:
            break
    return compiled


def limit_reached() -> int | None:
    """The number of graphs that Dynamo compiles for one function, if this is the last of them.

    From the next one on it runs the function as it is: ``torch._dynamo.config.recompile_limit``.
    """
    current = CompileContext.current_compile_id()
    number = None if current is None else current.frame_compile_id
    config: Any = torch._dynamo.config
    limit = min(config.recompile_limit, config.accumulated_recompile_limit)
    return limit if number is not None and number + 1 >= limit else None


def is_bucket(gm: fx.GraphModule) -> bool:
    """Is the graph a piece that Dynamo cut out to overlap DistributedDataParallel's reductions?"""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(getattr(reason, "reason", "")).startswith("DDPOptimizer")
