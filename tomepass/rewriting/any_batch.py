"""Works out what an operator returns for any batch size from what it returns for two sizes.

On fake tensors with a symbolic size every operator reasons about each size it meets, which takes
up to a hundred times as long as with numbers. So an operator is run for two batches of fixed size,
and sizes that differ between the two results are taken to grow with the batch:
``[1009, 197, 64]`` and ``[2003, 197, 64]`` are ``[B, 197, 64]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_BATCHES = (1009, 2003)
"""Odd primes, larger than what else a model counts: a batch is not taken for something else."""


_PLAIN = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class NotTold(Exception):
    """What an operator returns cannot be told from two batches: it is to be run as it is."""


@dataclass(frozen=True)
class _Varies:
    """A size that depends on the batch, for each of the two."""

    values: tuple[int, int]


@dataclass(frozen=True)
class _Like:
    """A tensor without its values."""

    sizes: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    learned: bool = False


@dataclass(frozen=True)
class _Number:
    """A number with its type: as parts of a key 1, 1.0 and True are the same."""

    kind: type
    value: Any


class AnyBatch:
    """What operators return for fake tensors of one symbolic size at most: the batch.

    Args:
        fake_mode: of the tensors that are returned.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._symbol: Any = None
        self._sizes: dict[_Varies, Any] = {}

    def returned(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """What an operator returns: fake tensors and numbers.

        Args:
            operator: an overload of ``torch.ops``.
            args, kwargs: what it is called with.

        Returns:
            what shares no memory with the arguments.

        Raises:
            NotTold: if sizes depend on more than the batch, or are no linear function of it.
        """
        call, modes = self._described((args, kwargs)), _modes()
        calls = [_at(call, i) for i in (0, 1)]
        result = _result(operator, calls[0], modes)
        if calls[0] != calls[1]:
            result = _joined(result, _result(operator, calls[1], modes))
        with self._fake_mode:
            return self._made(result)

    def _described(self, value: Any) -> Any:
        """A value as a key: tensors without what they hold, sizes for each of two batches."""
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return (type(value), *map(self._described, value))
        if isinstance(value, dict):
            return (dict, *((key, self._described(item)) for key, item in value.items()))
        if isinstance(value, (bool, int, float, complex)):
            return _Number(type(value), value)
        if isinstance(value, _PLAIN):
            return value
        raise NotTold

    def _tensor(self, value: Tensor) -> _Like:
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise NotTold
        sizes, strides = (tuple(map(self._size, many)) for many in (value.shape, value.stride()))
        return _Like(sizes, strides, value.dtype, value.device, value.requires_grad)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        symbol, values = _evaluated(size.node.expr)
        if symbol is None:
            return values[0]
        if self._symbol is None and not size.node.shape_env.is_unbacked_symint(symbol):
            self._symbol = symbol
        if symbol != self._symbol:
            raise NotTold
        varies = _Varies(values)
        self._sizes.setdefault(varies, size)
        return varies

    def _made(self, result: Any) -> Any:
        """Fake tensors and numbers like those described, in the fake mode that is on."""
        if isinstance(result, _Like):
            sizes, strides = (tuple(map(self._made, m)) for m in (result.sizes, result.strides))
            return torch.empty_strided(sizes, strides, dtype=result.dtype, device=result.device)
        if isinstance(result, _Varies):
            return self._grown(result)
        if isinstance(result, tuple):
            kind, *items = result
            return kind(map(self._made, items))
        return result.value if isinstance(result, _Number) else result

    def _grown(self, varies: _Varies) -> Any:
        if varies not in self._sizes:
            batch = self._sizes.get(_Varies(_BATCHES))
            small, large = varies.values
            step, rest = divmod(large - small, _BATCHES[1] - _BATCHES[0])
            start = small - step * _BATCHES[0]
            # Squares have a whole step as well, and start far below nothing.
            if rest or abs(start) >= _BATCHES[0] or batch is None:
                raise NotTold
            self._sizes[varies] = step * batch + start
        return self._sizes[varies]


@lru_cache(maxsize=4096)
def _evaluated(expression: Any) -> tuple[Any, tuple[int, int]]:
    """The symbol in a symbolic size and its value for each batch."""
    symbols = sorted(expression.free_symbols, key=str)
    if len(symbols) > 1:
        raise NotTold
    values = [expression.xreplace(dict.fromkeys(symbols, batch)) for batch in _BATCHES]
    if any(not getattr(value, "is_Integer", True) for value in values):
        raise NotTold
    return (symbols[0] if symbols else None), (int(values[0]), int(values[1]))


def _at(value: Any, i: int) -> Any:
    """What was described, for one of the two batches."""
    if isinstance(value, _Varies):
        return value.values[i]
    if isinstance(value, _Like):
        sizes, strides = (tuple(_at(n, i) for n in many) for many in (value.sizes, value.strides))
        return _Like(sizes, strides, value.dtype, value.device, value.learned)
    return tuple(_at(item, i) for item in value) if isinstance(value, tuple) else value


def _joined(small: Any, large: Any) -> Any:
    """What was returned for each of the two batches, as one."""
    if type(small) is not type(large):
        raise NotTold
    if type(small) is int and small != large:
        return _Varies((small, large))
    if isinstance(small, _Number) and small.kind is int and small != large:
        return _Varies((small.value, large.value))
    if isinstance(small, _Like):
        sizes, strides = (
            tuple(map(_joined, *pair))
            for pair in ((small.sizes, large.sizes), (small.strides, large.strides))
        )
        if len(small.sizes) != len(large.sizes):
            raise NotTold
        joined = _Like(sizes, strides, small.dtype, small.device)
        if (small.dtype, small.device) != (large.dtype, large.device):
            raise NotTold
        return joined
    if isinstance(small, tuple) and len(small) == len(large):
        return tuple(map(_joined, small, large))
    if small != large:
        raise NotTold
    return small


@lru_cache(maxsize=4096)
def _result(operator: Any, call: Any, modes: Any) -> Any:
    """What an operator returns, without its values; ``modes`` are those that it is run in."""
    mode = FakeTensorMode()
    try:
        with mode:
            args, kwargs = _filled(call)
            return _without_values(operator(*args, **kwargs))
    except NotTold:
        raise
    except Exception as error:  # it is run as it is, which says the same in the user's sizes
        raise NotTold from error


def _filled(value: Any) -> Any:
    if isinstance(value, _Like):
        tensor = torch.empty_strided(
            value.sizes, value.strides, dtype=value.dtype, device=value.device
        )
        return tensor.requires_grad_(value.learned)
    if isinstance(value, _Number):
        return value.value
    if not isinstance(value, tuple):
        return value
    kind, *items = value
    if kind is dict:
        return {key: _filled(item) for key, item in items}
    return kind(map(_filled, items))


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise NotTold
        return _Like(tuple(value.shape), value.stride(), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_without_values, value))
    if value is None:
        return None
    if isinstance(value, (bool, int, float)):
        return _Number(type(value), value)
    raise NotTold


def _modes() -> tuple[Any, ...]:
    """What else decides the result of an operator: gradients, autocast, the default dtype."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        *(
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
            for kind in ("cpu", "cuda", "mps", "xpu")
        ),
    )
