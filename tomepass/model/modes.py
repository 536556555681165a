"""Settings of the process that a model's own code asks for while it is captured.

``torch.is_grad_enabled()`` in a forward decides about the graph; so do autocast, inference mode and
what wants gradients. What torch's own code asks for in between is no business of the model's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# A function of torch, and what it was asked with, by position and by name.
Asked = tuple[Callable[..., Any], tuple[Any, ...], tuple[tuple[str, Any], ...]]


_HOMES = (torch, torch.backends.cuda)

_NAMES = (
    *("is_grad_enabled", "is_inference_mode_enabled", "get_default_dtype", "get_default_device"),
    *("is_autocast_enabled", "get_autocast_dtype", "is_autocast_cache_enabled"),
    *("is_autocast_cpu_enabled", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"),
    *("are_deterministic_algorithms_enabled", "get_deterministic_debug_mode"),
    *("get_float32_matmul_precision", "get_num_threads"),
    *("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled"),
)


# Those that torch itself calls old, and what they stand for.
_OLD = {
    "is_autocast_cpu_enabled": (torch.is_autocast_enabled, ("cpu",)),
    "get_autocast_cpu_dtype": (torch.get_autocast_dtype, ("cpu",)),
    "get_autocast_gpu_dtype": (torch.get_autocast_dtype, ("cuda",)),
}


_OF_A_DEVICE = ("is_autocast_enabled", "get_autocast_dtype")

_FUNCTIONS = {name: f for home in _HOMES for name in _NAMES if (f := vars(home).get(name))}

_GRADIENTS = (Tensor.requires_grad, Tensor.is_leaf, Tensor.grad_fn)


class Modes:
    """What was asked for.

    Args:
        asked: functions of torch with their arguments.
        gradients: whether some tensor was asked for its ``requires_grad``, ``is_leaf`` or
            ``grad_fn``.
    """

    def __init__(self) -> None:
        self.asked: dict[Asked, None] = {}
        self.gradients = False

    def everything(self) -> None:
        """As if all had been asked for: what Dynamo traces asks without being noted."""
        for name, function in _FUNCTIONS.items():
            for device in ("cpu", "cuda") if name in _OF_A_DEVICE else (None,):
                self.ask(function, () if device is None else (device,), {})
        self.gradients = True

    def ask(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notes that a function was asked."""
        function, args = _OLD.get(function.__name__, (function, args))
        self.asked[function, args, tuple(sorted(kwargs.items()))] = None

    @property
    def asks_for_inference(self) -> bool:
        """Was it asked whether inference mode is on?"""
        return any(function is torch.is_inference_mode_enabled for function, *_ in self.asked)

    def answers(self) -> list[Any]:
        """What the functions answer now."""
        return [function(*args, **dict(kwargs)) for function, args, kwargs in self.asked]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what the model's code asks for in this thread, in the block."""
        replaced = [
            (names, name, function, _Noting(self, function)) for names, name, function in _places()
        ]
        for names, name, _, noting in replaced:
            names[name] = noting.called
        try:
            with _Gradients(self):
                yield
        finally:
            for names, name, function, _ in replaced:
                names[name] = function


class _Noting:
    """A function of torch that notes who asks."""

    def __init__(self, modes: Modes, function: Callable[..., Any]) -> None:
        mine = threading.get_ident()

        def called(*args: Any, **kwargs: Any) -> Any:
            # Dynamo traces this where a forward holds a torch.cond: it knows the function itself.
            here = not torch.compiler.is_dynamo_compiling() and threading.get_ident() == mine
            if here and _of_the_model(sys._getframe(1)):
                modes.ask(function, args, kwargs)
            return function(*args, **kwargs)

        self.called = called


class _Gradients(TorchFunctionMode):
    """Sees attributes of tensors being read."""

    def __init__(self, modes: Modes) -> None:
        super().__init__()
        self.modes = modes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__self__", None) in _GRADIENTS and _of_the_model(sys._getframe(1)):
            self.modes.gradients = True
        return func(*args, **(kwargs or {}))


def _of_the_model(frame: FrameType | None) -> bool:
    """Is the code of a frame neither torch's nor ours?"""
    name = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] not in ("torch", "tomepass")


def _places() -> list[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """Where the functions are looked up: in torch, and where somebody imported them from it."""
    known = {id(function): function for function in _FUNCTIONS.values()}
    found = []
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", {}) if module is not None else {}
        own = module in _HOMES
        if not own and name.partition(".")[0] in ("torch", "tomepass"):
            continue
        found += [(names, n, known[id(v)]) for n, v in list(names.items()) if id(v) in known]
    return found
