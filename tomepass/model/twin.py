"""A model's twin to capture: the same tensors in other modules.

``torch.export`` puts fake tensors in place of a model's parameters while it works, and a forward
may write to the module it belongs to. Neither may be seen by another thread, nor stay after a
failure, so the twin is captured and not the model. It notes what its forward reads.
"""

from __future__ import annotations

import collections
import enum
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import is_not
from typing import Any

import torch
from torch import nn

from tomepass.model.modes import Modes

# Copied with what they hold, since a forward may write to them.
_CONTAINERS = (list, dict, set, collections.deque)


# Objects of these packages are shared: nothing of a model's hangs on them.
_HEAP_TYPE = 1 << 9  # a flag of classes that are made while the program runs


_SHARED_PACKAGES = frozenset(sys.stdlib_module_names) - {"argparse"} | {
    *("builtins", "torch", "numpy", "tomepass")
}


# Where nn.Module keeps what its __getattr__ finds.
OF_MODULE = ("_parameters", "_buffers", "_modules")


MISSING = object()
"""What an attribute was that was not there."""


@dataclass
class Reads:
    """What a forward read of one object, by attribute name, in order.

    Args:
        original: the object of the model, whose twin was read.
        twin: the twin.
        names: the attributes read before they were written.
        whole: nothing could be noted, so anything may have been read.
        before: what was written, as it was before.
        after: the same, as it was written last.
    """

    original: Any
    twin: Any
    names: dict[str, None] = field(default_factory=dict)
    whole: bool = False
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    def everything(self) -> Reads:
        """The same, as if all that there is had been read, but for what the forward writes."""
        kept = object.__getattribute__(self.original, "__dict__")
        places = [kept, *(kept[name] for name in OF_MODULE if name in kept)]
        places += [c.__dict__ for c in type(self.original).__mro__ if c not in nn.Module.__mro__]
        names = {name: None for place in places for name in place if name not in self.before}
        return replace(self, names=self.names | names)

    def take_tensors_back(self) -> None:
        """Undoes what was written and holds values of this run, as a cache of a table does."""
        held = object.__getattribute__(self.twin, "__dict__")
        for name, value in self.before.items():
            if isinstance(held.get(name), torch.Tensor):
                if value is MISSING:
                    del held[name]
                else:
                    held[name] = value

    @property
    def kept(self) -> dict[str, Any]:
        """What the forward keeps from call to call: read, and then written otherwise."""
        return {
            name: value
            for name, value in self.after.items()
            if name in self.names
            and isinstance(value, (bool, int, float, str, tuple))
            and value != self.before[name]
        }


class Twin:
    """A structural clone of a model.

    Modules, containers and plain objects are copied, references among them point to the copies;
    tensors and all else are shared.

    Args:
        model: stays as it is.
        noting: whether what is read can be noted: then classes are others of the same name.
    """

    def __init__(self, model: nn.Module, noting: bool = True) -> None:
        self._memo: dict[int, Any] = {}
        self._keep: list[Any] = []  # ids stay unique while it lives
        self._classes: dict[type, type] = {}
        self._reads: dict[int, Reads] = {}
        self.edited: set[int] = set()
        self.modes = Modes()
        self.unseen = False  # set where Dynamo traced parts of the forward: it notes nothing
        self._thread: int | None = None
        self._mixin = _recording(self) if noting else None
        self.model: nn.Module = self.copy(model)

    @property
    def reads(self) -> list[Reads]:
        """What was read of each object, in the order of the copies."""
        noted = self._reads.values()
        if self.unseen:
            return [reads.everything() for reads in noted]
        return [reads for reads in noted if reads.names or reads.whole]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what this thread reads of the twin in the block."""
        before, self._thread = self._thread, threading.get_ident()
        try:
            with self.modes.noting():
                yield
        finally:
            self._thread = before
            self.edited |= self._edited()
            for reads in self._reads.values():
                reads.take_tensors_back()

    def _edited(self) -> set[int]:
        """The containers of the model, by id, whose copies hold something else than they."""
        found = set()
        for value in self._keep:
            if isinstance(value, _CONTAINERS):
                then = [self._memo.get(id(item), item) for item in items_of(value)]
                now = items_of(self._memo[id(value)])
                if len(now) != len(then) or any(map(is_not, now, then)):
                    found.add(id(value))
        return found

    def copy(self, value: Any) -> Any:
        """The twin's counterpart of anything that hangs on the model."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        copier = self._copier(value)
        if copier is None or (copied := copier(value)) is value:
            return value
        return self._remember(value, copied)

    def _copier(self, value: Any) -> Callable[[Any], Any] | None:
        if isinstance(value, (torch.Tensor, torch.jit.ScriptModule, type)):
            return None
        if isinstance(value, nn.Module):
            return self._object
        for kind, copier in self._kinds:
            if isinstance(value, kind):
                return functools.partial(copier, self)
        return self._object if _is_plain(value) else None

    def _remember(self, value: Any, copied: Any) -> Any:
        self._memo[id(value)] = copied
        self._keep.append(value)
        return copied

    # ---- kinds ----------------------------------------------------------------------------

    def _object(self, value: Any) -> Any:
        """A module, or an object of plain Python: another with copies of its attributes."""
        cls, notes = self._class(type(value))
        try:
            twin = self._remember(value, object.__new__(cls))
        except TypeError:
            return value  # made by a constructor of its own alone
        held = object.__getattribute__(twin, "__dict__")
        reads = Reads(value, twin, whole=not notes)
        self._reads[id(held)] = reads
        for name, attribute in object.__getattribute__(value, "__dict__").items():
            held[name] = None if name == "_compiled_call_impl" else self.copy(attribute)
        for name in _slots(type(value)):
            if hasattr(value, name):
                object.__setattr__(twin, name, self.copy(getattr(value, name)))
        return twin

    def _namespace(self, value: Any) -> Any:
        copied = self._remember(value, type(value)())
        copied.__dict__.update({name: self.copy(v) for name, v in vars(value).items()})
        return copied

    def _list(self, value: Any) -> Any:
        copied = self._remember(value, _emptied(value))
        copied.extend(self.copy(item) for item in value)
        return copied

    def _dict(self, value: Any) -> Any:
        copied = self._remember(value, _emptied(value))
        for key, item in value.items():
            copied[self.copy(key)] = self.copy(item)
        return copied

    def _set(self, value: Any) -> Any:
        copied = self._remember(value, _emptied(value))
        copied.update(self.copy(item) for item in value)
        return copied

    def _tuple(self, value: Any) -> Any:
        items = [self.copy(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        made = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self._remember(value, made)

    def _bound(self, value: Any) -> Any:
        return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))

    def _builtin(self, value: Any) -> Any:
        """A method of a container, such as ``features.append``."""
        owner = getattr(value, "__self__", None)
        held = isinstance(owner, _CONTAINERS)
        return getattr(self.copy(owner), value.__name__) if held else value

    def _partial(self, value: Any) -> Any:
        arguments = [self.copy(argument) for argument in value.args]
        named = {name: self.copy(argument) for name, argument in value.keywords.items()}
        made = type(value)(self.copy(value.func), *arguments, **named)
        self._remember(value, made)
        made.__dict__.update({name: self.copy(v) for name, v in value.__dict__.items()})
        return made

    def _function(self, value: Any) -> Any:
        """A function with its own copies of what it closes over."""
        if not (value.__closure__ or value.__defaults__ or value.__kwdefaults__ or value.__dict__):
            return value
        cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, None, cells or None
        )
        self._remember(value, made)
        for old, new in zip(value.__closure__ or (), cells, strict=True):
            with_contents = _contents(old)
            if with_contents and not _contents(new):
                new.cell_contents = self.copy(with_contents[0])
        made.__defaults__ = self.copy(value.__defaults__)
        made.__kwdefaults__ = self.copy(value.__kwdefaults__)
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        made.__annotations__ = value.__annotations__
        made.__dict__.update({name: self.copy(v) for name, v in value.__dict__.items()})
        return made

    def _cell(self, cell: Any) -> Any:
        if id(cell) not in self._memo:
            self._remember(cell, types.CellType())
        return self._memo[id(cell)]

    def _reference(self, value: Any) -> Any:
        target = value()
        if target is None or self._copier(target) is None:
            return value
        return weakref.ref(self.copy(target))

    _kinds: tuple[tuple[Any, Callable[..., Any]], ...] = (
        ((list, collections.deque), _list),
        (dict, _dict),
        (set, _set),
        (tuple, _tuple),
        (types.SimpleNamespace, _namespace),
        (types.MethodType, _bound),
        (types.BuiltinMethodType, _builtin),
        (functools.partial, _partial),
        (types.FunctionType, _function),
        (weakref.ref, _reference),
    )

    # ---- classes that note what is read ------------------------------------------------------

    def _class(self, cls: type) -> tuple[type, bool]:
        """A class of the same name that notes what is read, if it can be made."""
        if self._mixin is None:
            return cls, False
        if cls not in self._classes:
            self._classes[cls] = _noting_class(self._mixin, cls)
        made = self._classes[cls]
        return made, made is not cls


def _noting_class(mixin: type, cls: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__slots__": ()}
    if "__dict__" not in dir(cls):
        return cls
    try:
        return type(cls)(cls.__name__, (mixin, cls), names)
    except Exception:
        return cls  # it cannot be subclassed so


def _recording(twin: Twin) -> type:
    """The base class of copies that tell their twin what is read and written."""

    class Recording:
        __slots__ = ()

        def __init_subclass__(cls, **options: Any) -> None:
            """Keeps what a class does with its subclasses from being done."""

        def __getattribute__(self, name: str) -> Any:
            # Dynamo, which traces this where a forward holds a torch.cond, leaves it out.
            if not torch.compiler.is_dynamo_compiling() and twin._thread == threading.get_ident():
                held = object.__getattribute__(self, "__dict__")
                reads = twin._reads.get(id(held))
                if reads is not None and name not in reads.before:
                    reads.names.setdefault(name)
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if not torch.compiler.is_dynamo_compiling() and twin._thread == threading.get_ident():
                held = object.__getattribute__(self, "__dict__")
                reads = twin._reads.get(id(held))
                if reads is not None:
                    reads.before.setdefault(name, held.get(name, MISSING))
                    reads.after[name] = value
            super().__setattr__(name, value)

    return Recording


def _is_plain(value: Any) -> bool:
    """An object that is its attributes and no more, of a class somebody wrote in Python."""
    cls = type(value)
    if not hasattr(value, "__dict__"):
        return False
    package = (cls.__module__ or "").partition(".")[0]
    # All bases are Python's: nothing is kept where it could not be copied from.
    written = all(base is object or base.__flags__ & _HEAP_TYPE for base in cls.__mro__)
    return written and package not in _SHARED_PACKAGES and not issubclass(cls, enum.Enum)


def items_of(container: Any) -> tuple[Any, ...]:
    """Everything in a container, keys among it."""
    if isinstance(container, dict):
        return (*container, *container.values())
    return tuple(container)


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield name


def _emptied(value: Any) -> Any:
    """A new container of the same kind, with nothing in it."""
    if type(value) in (list, dict, set):
        return type(value)()
    if isinstance(value, collections.defaultdict):
        return type(value)(value.default_factory)
    if isinstance(value, collections.deque):
        return type(value)(maxlen=value.maxlen)
    return type(value)()


def _contents(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()  # not assigned yet
