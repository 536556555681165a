"""How a model's methods are called: inputs by position and by name as one call."""

from __future__ import annotations

import enum
import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.errors import NotCaptured

REST = "*"
"""Where a call keeps what was given by position to a method that names no such inputs."""


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

# What a capture can depend on: values told apart by their repr.
_PLAIN = (numbers.Number, str, bytes, type(None), type(...), slice, range, enum.Enum)


_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a method, as its signature has them.

    Args:
        owner: whose method it is, for messages.
        names: in order, of those that can be given by position.
        optional: names of those whose default is None.
        rest: whether more can be given by position (``*args``).
    """

    owner: str
    names: tuple[str, ...]
    optional: frozenset[str]
    rest: bool

    @classmethod
    def of(cls, model: nn.Module, method: str = "forward") -> Inputs:
        """Of a method of a model, ``forward`` by default."""
        signature = forward_signature(model) if method == "forward" else _signature(model, method)
        parameters = signature.parameters.values()
        return cls(
            type(model).__name__ if method == "forward" else f"{type(model).__name__}.{method}",
            tuple(p.name for p in parameters if p.kind in _POSITIONAL),
            frozenset(p.name for p in parameters if p.default is None),
            any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters),
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs as keywords, in the order of the signature; :func:`call_with` takes them.

        Raises:
            TypeError: if there are too many, or one is given twice.
        """
        names = self.names
        if len(args) > len(names) and not self.rest:
            raise TypeError(
                f"{self.owner} takes at most {len(names)} positional inputs, got {len(args)}"
            )
        given = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name in given:
                raise TypeError(f"input {name!r} was given twice, by position and by name")
        given.update(kwargs)
        ordered = {name: given.pop(name) for name in names if name in given}
        ordered.update((name, given[name]) for name in sorted(given))
        # An optional input left out or given as None is one call.
        optional = self.optional
        call = {n: v for n, v in ordered.items() if not (v is None and n in optional)}
        if len(args) > len(names):
            # What stands before them must be given by position too.
            call = {n: v for n, v in call.items() if n not in names}
            call[REST] = tuple(args)
        return call


def call_with(function: Callable[..., Any], call: Mapping[str, Any]) -> Any:
    """Calls a function with inputs as :meth:`Inputs.bind` gives them."""
    if REST not in call:
        return function(**call)
    return function(*call[REST], **{name: v for name, v in call.items() if name != REST})


def as_call(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """A tensor, a tuple of positional inputs or a dict of keyword inputs, as both.

    Raises:
        TypeError: if it is none of them.
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), inputs
    raise TypeError(
        "inputs must be a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"got {type(inputs).__name__}"
    )


def forward_signature(model: nn.Module) -> inspect.Signature:
    """The signature of a model's forward, by which others tell its inputs and labels.

    A wrapper that says how to get at its model and passes all inputs on (a PeftModel) is looked
    through.
    """
    signature = _signature(model, "forward")
    kinds = {p.kind for p in signature.parameters.values()}
    inner = getattr(model, "get_base_model", None)
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} and inner:
        base = inner()
        if isinstance(base, nn.Module) and base is not model:
            return forward_signature(base)
    return signature


def check_call(call: Mapping[str, Any], method: str = "forward") -> None:
    """Refuses inputs that no capture can stand for, and tracers that cannot follow one.

    Raises:
        TomeError: if ``torch.jit.trace`` or ``torch.fx`` traces, or an input is an object whose
            state may change, such as a cache.
    """
    if torch._C._get_tracing_state() is not None or any(
        isinstance(v, fx.Proxy) for v in pytree.tree_leaves(call)
    ):
        raise no_tracing()
    for name, value in call.items():
        if (strange := _strange(value)) is not None:
            raise NotCaptured(
                f"input {name!r} of {method} holds an instance of {type(strange).__name__}, which "
                "a capture cannot tell from another one",
                advice="give tensors, numbers and strings, in tuples, lists or dicts",
            )


def no_tracing() -> NotCaptured:
    """The refusal of tracers, which cannot follow a merged model."""
    return NotCaptured(
        "a merged model cannot be traced by torch.jit.trace or torch.fx.symbolic_trace, which "
        "would fix the batch size and record choices of tokens as constants (tracers stand "
        "behind torch.onnx.export(dynamo=False), openvino.convert_model and fvcore too)",
        advice="tomepass.export(model, method, example_inputs=inputs) gives a program that "
        "keeps the batch dynamic; tomepass export on the command line writes it for ONNX "
        "Runtime, OpenVINO and others",
    )


def _strange(value: Any) -> Any:
    """What is no plain value in an input, or None."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((s for v in value if (s := _strange(v)) is not None), None)
    plain = isinstance(value, (Tensor, *_PLAIN, *_PLAIN_OF_TORCH))
    return None if plain or isinstance(value, type) else value


def _signature(model: nn.Module, method: str) -> inspect.Signature:
    try:
        return inspect.signature(getattr(model, method))
    except ValueError as error:  # of a function that is not written in Python
        raise NotCaptured(
            f"the inputs of {type(model).__name__}.{method} cannot be told: {error}",
            advice="give a module whose forward is a Python function that names its inputs",
        ) from error


def describe_inputs(kwargs: dict[str, Any]) -> str:
    """``pixel_values float32[2, 3, 224, 224], labels int64[2], return_dict=False``."""
    return ", ".join(
        f"{name} {_described(v)}" if isinstance(v, Tensor) else f"{name}={_described(v)}"
        for name, v in kwargs.items()
        if v is not None
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    return f"{{{describe_inputs(value)}}}" if isinstance(value, dict) else repr(value)
