"""Is a model still what it was when it was captured, as far as its forward looked?

Asked at each call, so it is lists compared by the interpreter's own loops: no look-up by name
through the model's modules, no code of the model's.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tomepass.model.modes import Modes
from tomepass.model.twin import OF_MODULE, Reads, items_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)

_NOT_READ = ("__dict__", "__class__")

# What every module has a say in, whoever called it.
_EVERYWHERE = ("_global_forward_hooks", "_global_forward_pre_hooks")


@dataclass(eq=False)
class Guards:
    """What a capture's forward read of a model, and whether that still stands.

    Args:
        model: the model that was captured.
        reads: what was read of its objects.
        edited: containers by id that the forward itself edits, which say nothing.
        fused: the graph holds a layer that PyTorch fuses only where nothing needs gradients.
        modes: settings of the process that the model's code asked for.
    """

    model: nn.Module
    reads: Iterable[Reads]
    edited: Iterable[int] = ()
    fused: bool = False
    modes: Modes = field(default_factory=Modes)
    # Dictionaries, what takes some values out of each, and the values that must come out.
    _values: list[tuple[Any, itemgetter[Any], tuple[Any, ...]]] = field(default_factory=list)
    _absent: list[tuple[Any, str]] = field(default_factory=list)
    _empty: list[Any] = field(default_factory=list)
    _contents: list[tuple[Any, tuple[Any, ...]]] = field(default_factory=list)
    _cells: list[tuple[Any, Any]] = field(default_factory=list)
    _tensors: list[tuple[Any, str]] = field(default_factory=list)
    _owners: list[Any] = field(default_factory=list)
    _classes: list[type] = field(default_factory=list)
    _watched: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        registered = set(map(id, self.model.modules()))
        for reads in self.reads:
            self._owners.append(reads.original)
            self._classes.append(type(reads.original))
            if reads.whole:
                self._watch(vars(reads.original))
                continue
            names = [name for name in reads.names if name not in _NOT_READ]
            self._add(reads.original, names, id(reads.original) in registered)
        for name in _EVERYWHERE:
            self._watch(getattr(nn_module, name))
        self.reads = ()
        self._forms = _forms(self._read_tensors())
        self._mode = self._toggles()

    def hold(self) -> bool:
        """Would a capture made now read what this one read?"""
        try:
            return (
                all(map(is_, map(type, self._owners), self._classes))
                and not any(self._empty)
                and all(
                    all(map(is_, get(held), then)) or _alike(get(held), then)
                    for held, get, then in self._values
                )
                and not any(name in held for held, name in self._absent)
                and all(_alike(items_of(held), then) for held, then in self._contents)
                and all(_alike((cell.cell_contents,), (then,)) for cell, then in self._cells)
                and _forms(self._read_tensors()) == self._forms
                and self._toggles() == self._mode
            )
        except (KeyError, ValueError, AttributeError):
            return False  # something read is gone, or is no tensor any more

    def _read_tensors(self) -> list[Any]:
        return [held[name] for held, name in self._tensors]

    def _toggles(self) -> tuple[Any, ...]:
        """Settings of the process that decide about graphs."""
        trains = self.fused and torch.is_grad_enabled() and self._needs_gradients()
        asked = self.modes.answers()
        if self.modes.gradients:
            asked += [value is not None and value.requires_grad for value in self._read_tensors()]
            asked.append(torch.is_grad_enabled())
        fast = torch.backends.mha.get_fastpath_enabled()
        return (torch.get_default_dtype(), fast, trains, *asked)

    def _needs_gradients(self) -> bool:
        return any(value.requires_grad for value in self._read_tensors() if value is not None)

    # ---- what to look at --------------------------------------------------------------------

    def _add(self, owner: Any, names: list[str], registered: bool) -> None:
        held = object.__getattribute__(owner, "__dict__")
        places = [held]
        if isinstance(owner, nn.Module):
            places += [held[place] for place in OF_MODULE if place in held]
        found: dict[int, dict[str, Any]] = {}
        for name in names:
            place = next((p for p in places if name in p), None)
            if place is None:
                self._add_of_class(type(owner), held, places, name)
            elif isinstance(place[name], Tensor) and registered:
                # Its values are read at each call, so only what it is like was captured.
                self._tensors.append((place, name))
            else:
                found.setdefault(id(place), {})[name] = place[name]
        for place in places:
            self._expect(place, found.get(id(place), {}))

    def _expect(self, place: Any, found: dict[str, Any]) -> None:
        if not found:
            return
        names = (*found, next(iter(found)))  # of two or more an itemgetter makes a tuple
        get = itemgetter(*names)
        self._values.append((place, get, get(place)))
        for value in found.values():
            self._watch(value)

    def _add_of_class(self, cls: type, held: Any, places: list[Any], name: str) -> None:
        """What an instance does not hold itself: of its class, or nowhere."""
        owner = next((base for base in cls.__mro__ if name in base.__dict__), None)
        if owner is None:
            self._absent += [(place, name) for place in places]
            return
        if owner in (object, nn.Module) and name != "forward":
            return
        value = owner.__dict__[name]
        if not hasattr(type(value), "__set__"):
            self._absent.append((held, name))
        if (owner, name) not in self._watched:
            self._watched[owner, name] = value
            self._expect(owner.__dict__, {name: value})

    def _watch(self, value: Any) -> None:
        """What can be edited in place is looked into."""
        if isinstance(value, _PLAIN) or id(value) in self._watched:
            return
        self._watched[id(value)] = value
        if id(value) in self.edited:
            return
        if isinstance(value, (list, dict, set, collections.deque)):
            if not value:
                self._empty.append(value)
                return
            self._contents.append((value, items_of(value)))
        if isinstance(value, (list, dict, set, collections.deque, tuple)):
            for item in items_of(value):
                self._watch(item)
        elif isinstance(value, types.SimpleNamespace):
            self._watch(vars(value))
        elif isinstance(value, types.MethodType):
            self._watch(value.__func__)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._watch(part)
        elif isinstance(value, (staticmethod, classmethod)):
            self._watch(value.__func__)
        elif isinstance(value, property):
            self._watch(value.fget)
        elif isinstance(value, types.FunctionType):
            self._watch_function(value)

    def _watch_function(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                continue  # not assigned yet
            self._cells.append((cell, content))
            self._watch(content)
        known = function.__globals__
        numbers = {
            name: known[name]
            for name in function.__code__.co_names
            if name in known and isinstance(known[name], _PLAIN)
        }
        self._expect(known, numbers)


def _alike(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    """The same objects, or equal numbers, words and tuples of such of the same types."""
    if len(now) != len(then):
        return False
    for new, old in zip(now, then, strict=True):
        if new is old:
            continue
        if type(new) is not type(old):
            return False
        if isinstance(old, tuple) and not isinstance(old, torch.Size):
            if not _alike(new, old):
                return False
        elif not isinstance(old, _PLAIN) or new != old:
            return False
    return True


def _forms(tensors: list[Any]) -> tuple[list[Any], ...]:
    """What a graph depends on in tensors beside their values."""
    return (
        [tensor.shape for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.device for tensor in tensors],
        [type(t) if is_traceable_wrapper_subclass(t) else None for t in tensors],
    )
