"""The inner backend: the compiler that gets the rewritten graph, found by name and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from tomepass.capture.dynamo import capture_dynamo, carry_marks
from tomepass.errors import TomeError
from tomepass.kernels.choose import take_kernels
from tomepass.kernels.written_out import FOR_TENSORRT
from tomepass.ops.library import COMPOSITES
from tomepass.sources.extras import import_extra

if TYPE_CHECKING:
    from torch import Tensor


Inner = str | Callable[..., Any]

InnerOptions = dict[str, Any] | tuple[tuple[str, Any], ...]

# The distribution that brings a backend which torch does not have itself.
_EXTRAS = {"openvino": "openvino", "tensorrt": "tensorrt", "torch_tensorrt": "tensorrt"}


def hashable(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options as sorted pairs, nested ones too."""
    return tuple(
        (name, hashable(value) if isinstance(value, dict) else value)
        for name, value in sorted(options.items())
    )


def as_options(pairs: InnerOptions) -> dict[str, Any]:
    """What :func:`hashable` made pairs of: a tuple of named pairs was a dict."""
    return {
        name: as_options(value) if _named_pairs(value) else value
        for name, value in dict(pairs).items()
    }


def _named_pairs(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
    )


def check_inner(inner: Any) -> None:
    """Refuses what names no compiler.

    Raises:
        TypeError: if it is neither a name nor a callable.
    """
    if not isinstance(inner, str) and not callable(inner):
        raise TypeError(f"inner must be a backend's name or a callable, got {inner!r}")


def resolve_inner(
    inner: Inner, options: dict[str, Any], mode: str | None = None
) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """The compiler behind a name, with its options bound.

    Inductor gets the kernels of :mod:`tomepass.kernels`, on a CPU where no gradients are needed;
    all other compilers get the composite operators. What has a kernel for CUDA and cannot take it
    is named in a warning.

    Raises:
        TomeError: if the backend is not installed or not known.
        TypeError: if ``inner`` is neither a name nor a callable.
    """
    check_inner(inner)
    if inner == "inductor":
        return _inductor(options, mode)
    if callable(inner):
        compiler: Any = inner
    else:
        compiler = _registered(inner)
    keywords: dict[str, Any] = {}
    if inner == "openvino":
        # Its other path traces anew under Dynamo's fake tensors, which torch 2.13 does not survive.
        options = {"aot_autograd": True} | options
    if options:
        keywords["options"] = options
    if mode is not None:
        keywords["mode"] = mode

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if inner == "openvino":
            _refuse_bfloat16(inputs)
        if _EXTRAS.get(str(inner)) == "tensorrt":
            written_out = {**COMPOSITES, **FOR_TENSORRT}
            # It has a table of decompositions of its own, which keeps operators it knows not.
            gm = carry_marks(gm, capture_dynamo(gm, inputs, written_out).module)
        compiled: Callable[..., Any] = compiler(gm, list(inputs), **keywords)
        return compiled

    return compile_graph


def _refuse_bfloat16(inputs: Sequence[Any]) -> None:
    """OpenVINO's bridge takes no bfloat16 tensors: without a word it runs the graph eagerly."""
    if any(isinstance(value, Tensor) and value.dtype is torch.bfloat16 for value in inputs):
        raise TomeError(
            "OpenVINO takes no bfloat16 tensors",
            advice="keep the model in float32: OpenVINO computes in bfloat16 itself where the "
            "processor can",
        )


def _inductor(options: dict[str, Any], mode: str | None) -> Callable[..., Any]:
    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = (list_mode_options(mode) if mode else {}) | options
        if patches.get("freezing") and not torch._inductor.config.freezing:
            raise TomeError(
                "freezing as an option does nothing: Dynamo reads the setting before any backend "
                "is called",
                advice="set TORCHINDUCTOR_FREEZING=1, or compile and call under "
                "torch._inductor.config.patch(freezing=True) and torch.no_grad()",
            )
        if fallen := take_kernels(gm, trains=_trains(inputs)).fallen:
            # There is no report here to say it.
            warnings.warn(f"not on Triton kernels: {'; '.join(fallen)}", stacklevel=2)
        compiled: Any = compile_fx(gm, list(inputs), config_patches=patches or None)
        return compiled  # type: ignore[no-any-return]

    return compile_graph


def _trains(inputs: Sequence[Any]) -> bool:
    """Whether a graph called with these needs gradients."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    )


def _registered(name: str) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    package = _EXTRAS.get(name)
    if package is not None:
        # Backends of other distributions register themselves on import.
        module = {"openvino": "openvino.torch", "tensorrt": "torch_tensorrt"}[package]
        import_extra(module, package, f"inner backend {name!r}")
    try:
        found: Callable[..., Any] = lookup_backend(name)
    except InvalidBackend as error:
        # Dynamo lists its debugging backends only on demand; these two are for everyone.
        known = {*list_backends(), "eager", "aot_eager", *_EXTRAS} - {"tome"}
        raise TomeError(
            f"torch.compile knows no backend {name!r}; it knows {', '.join(sorted(known))}"
        ) from error
    return found


def inner_name(inner: Inner) -> str:
    """A backend as tables and files call it."""
    return inner if isinstance(inner, str) else getattr(inner, "__name__", "callable")


def default_inner(device: str = "cpu") -> str:
    """``"inductor"`` where it can compile: on a CPU it needs a C++ compiler; else ``"eager"``."""
    if device != "cpu":
        return "inductor"
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:  # torch raises a class of its own that moves between versions
        return "eager"
    return "inductor"
