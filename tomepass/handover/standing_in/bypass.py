"""Calls of the model's other methods on a merged module, such as ``get_image_features``.

A method runs with the merged module as ``self``, so that a forward it calls merges tokens. Where
it computes attention without calling a forward, this is noticed while it runs, and the method is
captured and merged like a forward. Where that cannot be done, one warning says so.
"""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tomepass.errors import TomeError
from tomepass.handover.captures import NotPreparedError
from tomepass.model.calls import check_call

if TYPE_CHECKING:
    from tomepass.handover.standing_in.tome import Knowing, Tome


_ATTENTION = frozenset(
    {
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        torch._native_multi_head_attention,
        torch._transformer_encoder_layer_fwd,
    }
)


_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})

_KEPT = frozenset({F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.float})

_PRODUCT = frozenset(
    {
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm),
        *(torch.baddbmm, torch.einsum, torch.functional.einsum),
    }
)


_MOST_SHAPES = 8

# How a method is called: it was seen not to attend, or through a forward alone; it was captured;
# it attends and cannot be captured; it cannot run on the merged model.
_PLAIN, _CAPTURED, _UNMERGED, _ORIGINAL = "plain", "captured", "unmerged", "original"


class _Watch:
    """What is seen while a method runs."""

    def __init__(self) -> None:
        self.attends = False
        self.shapes = 0


class _Local(threading.local):
    def __init__(self) -> None:
        # The innermost last; None while a merged graph runs, or while nothing is to be seen.
        self.watches: list[_Watch | None] = []


_local = _Local()


class _SeeAttention(TorchFunctionMode):
    """Sees the operators of attention: fused, or a softmax whose result is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        watch = _local.watches[-1]
        if watch is None or watch.attends:
            return result
        if func in _ATTENTION:
            watch.attends = True
        elif func in _PRODUCT:
            watch.attends = self._weighs(args)
        elif isinstance(result, Tensor) and (
            result.ndim > 2 if func in _SOFTMAX else func in _KEPT and self._weighs(args)
        ):
            self.weights.add(_memory(result))
        return result

    def _weighs(self, args: tuple[Any, ...]) -> bool:
        if not self.weights:
            return False
        return any(
            isinstance(leaf, Tensor) and _memory(leaf) in self.weights
            for leaf in pytree.tree_leaves(args)
        )


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor of another kind has none
        return 0


@contextmanager
def merging() -> Iterator[None]:
    """While a merged graph runs: its attention is no attention that bypassed it."""
    _local.watches.append(None)
    try:
        yield
    finally:
        _local.watches.pop()


@contextmanager
def _watching() -> Iterator[_Watch]:
    watch = _Watch()
    _local.watches.append(watch)
    try:
        with _SeeAttention():
            yield watch
    finally:
        _local.watches.pop()


def captured_another() -> None:
    """Counts a capture made while a method runs.

    Raises:
        TomeError: where each call of the forward has another shape, as where text is generated.
    """
    watch = next((w for w in reversed(_local.watches) if w is not None), None)
    if watch is not None:
        watch.shapes += 1
        if watch.shapes > _MOST_SHAPES:
            raise TomeError(f"it calls the forward with more than {_MOST_SHAPES} shapes of inputs")


def called_through(merged: Knowing, name: str, function: Callable[..., Any]) -> Any:
    """A method of the model as one of the merged model.

    Args:
        merged: the merged model.
        name: of the method.
        function: it, as the model has it.
    """

    @functools.wraps(function)
    def method(self: Knowing, *args: Any, **kwargs: Any) -> Any:
        return _call(self, name, function, args, kwargs)

    return types.MethodType(method, merged)


def _call(
    merged: Knowing, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return _compiled(merged, name, function, args, kwargs)
    tome = merged._tome
    way = tome.ways.get(name)
    if way == _CAPTURED:
        try:
            return merged._tome_answer(tome.bind(args, kwargs, name), name)
        except TomeError as error:
            _tell(merged, name, error.reason)
    if way == _ORIGINAL:
        with merging():  # that it does not merge has been said
            return function(*args, **kwargs)
    with _watching() as watch:
        try:
            result = _rebound(merged, function)(*args, **kwargs)
        except TomeError as error:
            # What it calls cannot be captured: as it was, then.
            _tell(merged, name, error.reason)
            tome.ways[name] = _ORIGINAL
            result = function(*args, **kwargs)
            watch.attends = False
    if watch.attends and tome.ways.get(name, _PLAIN) == _PLAIN:
        return _capture(merged, name, args, kwargs, result)
    tome.ways.setdefault(name, _PLAIN)
    return result


def _capture(
    merged: Knowing, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """The result of a method that attends on its own, merged if it can be."""
    tome = merged._tome
    try:
        call = tome.bind(args, kwargs, name)
        check_call(call, name)
        merged_result = merged._tome_answer(call, name)
    except (TomeError, TypeError) as error:
        _tell(merged, name, getattr(error, "reason", str(error)))
        tome.ways[name] = _UNMERGED
        return result
    tome.ways[name] = _CAPTURED
    return merged_result


def _rebound(merged: Knowing, function: Any) -> Any:
    """A method of the model itself, with the merged model as ``self``."""
    own = isinstance(function, types.MethodType) and function.__self__ is merged._tome.model
    return types.MethodType(function.__func__, merged) if own else function


def _tell(merged: Knowing, name: str, reason: str) -> None:
    tome = merged._tome
    if f"told {name}" in tome.ways:
        return
    tome.ways[f"told {name}"] = reason
    warnings.warn(
        f"{type(tome.model).__name__}.{name} runs unmerged, wholly or in part: {reason}. Merged is "
        "what goes through the forward of the merged model, and methods that can be captured on "
        "their own",
        stacklevel=4,
    )


def _compiled(
    merged: Knowing, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A method called while Dynamo traces: what was captured before, or as it was seen to run."""
    if _way(merged._tome, name) == _CAPTURED:
        return merged._tome_answer(merged._tome.bind(args, kwargs, name), name)
    return _rebound(merged, function)(*args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _way(tome: Tome, name: str) -> str:
    """Runs while Dynamo traces, not when what it traced runs."""
    if (way := tome.ways.get(name)) is None:
        raise NotPreparedError(
            f"whether {name} attends without going through the forward was not seen before "
            "compiling",
            advice=f"call merged.{name}(...) once with inputs like these first",
        )
    return str(way)
