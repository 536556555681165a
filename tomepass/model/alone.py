"""Capturing while other threads go on: what tracing changes in the process is kept from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_lock = threading.RLock()

# A tracer puts its own in their place, for all threads.
_PATCHED = ("__call__", "__getattr__")


def one_at_a_time() -> AbstractContextManager[Any]:
    """The lock to hold while capturing: torch.export changes the whole process while it works.

    It is Dynamo's own, where it has one: compiling in another thread changes the same things.
    """
    from torch._dynamo import convert_frame

    lock: AbstractContextManager[Any] = getattr(convert_frame, "compile_lock", _lock)
    return lock


def exporting() -> bool:
    """Is this thread being exported? Flags of torch tell of any thread."""
    compiler: Any = torch.compiler
    # Dynamo of torch 2.11 takes `is_exporting()` for true whatever it compiles for.
    if not compiler._is_exporting_flag:
        return False
    return compiler.is_dynamo_compiling() or bool(_get_current_dispatch_mode_stack())


@dataclass(frozen=True)
class Untraced:
    """How modules are called and read where nobody traces, to be asked before tracing begins."""

    methods: tuple[Callable[..., Any], ...]

    @classmethod
    def now(cls) -> Untraced:
        """As it is now."""
        return cls(tuple(nn.Module.__dict__[name] for name in _PATCHED))

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """In the block, the tracer that called it sees the modules of this thread alone."""
        mine = threading.get_ident()
        traced = tuple(nn.Module.__dict__[name] for name in _PATCHED)
        for name, here, there in zip(_PATCHED, traced, self.methods, strict=True):
            setattr(nn.Module, name, _by_thread(mine, here, there))
        try:
            yield
        finally:
            for name, here in zip(_PATCHED, traced, strict=True):
                setattr(nn.Module, name, here)


def _by_thread(
    mine: int, here: Callable[..., Any], there: Callable[..., Any]
) -> Callable[..., Any]:
    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        chosen = here if threading.get_ident() == mine else there
        return chosen(module, *args, **kwargs)

    return called
