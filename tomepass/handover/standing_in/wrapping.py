"""A module that takes the place of a model: everything that is not about merging is the model's.

Attributes are read from the model and written to it; its parameters, buffers and children are
shared; ``isinstance`` and ``__class__`` answer with its class, and ``inspect.signature`` of the
forward with its inputs. So Trainer, accelerate, PEFT and pipelines treat a merged model as the
model.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from torch import Tensor, fx, nn

from tomepass.handover.captures import Captures
from tomepass.handover.standing_in.tome import Tome
from tomepass.model.calls import Inputs, forward_signature, no_tracing

V = TypeVar("V")

# What is shared with the model: the state, and what is done to it when it is saved and loaded.
SHARED = (
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


# Every module has these of its own: hooks, and what torch.compile leaves.
_OWN = frozenset({*nn.Module().__dict__, "_compiled_call_impl"} - {*SHARED, "training"})


_REMADE = frozenset({*SHARED, "_tome", "_tome_parts", "_compiled_call_impl"})

# Of a container, which Python looks up on the class.
_CONTAINER = ("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__contains__")


class _GivesWay:
    """An attribute of ours that gives way to the model's own of the same name.

    On the class it is the function itself: ``MergedModel.tome(merged)`` is always ours.
    """

    def __init__(self, function: Callable[..., Any], is_value: bool) -> None:
        self.function, self.is_value = function, is_value
        functools.update_wrapper(cast(Any, self), function)

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    def __get__(self, merged: Any, owner: Any = None) -> Any:
        if merged is None:
            return self.function
        if has_own(merged._tome.model, self.name):
            return of_the_model(merged, self.name)
        return self.function(merged) if self.is_value else types.MethodType(self.function, merged)


def value_gives_way(function: Callable[[Any], V]) -> V:
    """A value of ours, unless the model has something of the same name."""
    return cast(V, _GivesWay(function, is_value=True))


def moved(name: str, *, is_value: bool = False) -> Any:
    """A name of version 0.1 for what stands under ``merged.tome``: it works, and warns."""
    told = f"merged.{name} is merged.tome.{name} now"

    def value(merged: Any) -> Any:
        warnings.warn(told, DeprecationWarning, stacklevel=3)
        return getattr(merged._tome_added(), name)

    def method(merged: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return getattr(merged._tome_added(), name)(*args, **kwargs)

    function = value if is_value else method
    function.__name__, function.__doc__ = name, f"What ``merged.tome.{name}`` is."
    return _GivesWay(function, is_value)


class StandIn(nn.Module):
    """A module in a model's place; a subclass says what it answers.

    Subclasses define ``forward``, ``_tome_answer`` for calls of any method, and ``_tome_prepare``.
    """

    _tome: Tome

    def __init__(self, tome: Tome) -> None:
        super().__init__()
        self.__dict__["_tome"] = tome
        # The very dictionaries of the model: one module tree, seen through two objects.
        self.__dict__.update({name: tome.model.__dict__[name] for name in SHARED})
        tome.inputs["forward"] = Inputs.of(tome.model)

    def _tome_answer(self, call: dict[str, Any], method: str) -> Any:
        """What a method of the model gives for a call, merged."""
        raise NotImplementedError

    def _tome_prepare(self, inputs: Any) -> None:
        """Captures for inputs like these, if that is not done yet."""
        raise NotImplementedError

    @value_gives_way
    def _captures(self) -> Captures:
        return self._tome.captures

    # ---- attributes ------------------------------------------------------------------------

    # A type checker is to complete what is ours, and to refuse what nobody has.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "_tome" or (name.startswith("__") and name.endswith("__")):
                raise AttributeError(name)
            return of_the_model(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_tome" not in self.__dict__ or self._tome_keeps(name, value):
            super().__setattr__(name, value)
        else:
            self.__dict__.pop(name, None)
            setattr(self._tome.model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._tome.model, name)

    def _tome_keeps(self, name: str, value: Any) -> bool:
        """Whether an attribute is set beside the model's and not on it."""
        found = inspect.getattr_static(type(self), name, None)
        if isinstance(found, _GivesWay):
            if not has_own(self._tome.model, name):
                raise AttributeError(f"{name!r} of a merged model is fixed: apply tomepass again")
            return False
        if name in _OWN or isinstance(found, (types.FunctionType, property)):
            return True  # forward, which accelerate wraps; hooks
        if isinstance(value, (Tensor, nn.Module)):
            return False
        model = self._tome.model
        if name in model.__dict__ or any(name in model.__dict__[part] for part in SHARED[:4]):
            return False
        own = inspect.getattr_static(type(model), name, None)
        return own is None or isinstance(own, (types.FunctionType, classmethod, staticmethod))

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._tome.model)})

    # ---- state -----------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """The model's mode: there is one."""
        return self._tome.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_tome" in self.__dict__:  # nn.Module.__init__ sets it before there is a model
            self._tome.model.training = mode

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._tome.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Any:
        """Sets training mode, of the model too."""
        self._tome.model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self._tome.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self._tome.model.load_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        """A merged replica of the model, which reads the replica's own parameters."""
        model = self._tome.model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica = self._tome_over(model)
        replica.__dict__["_is_replica"] = True
        return replica

    def _tome_over(self, model: nn.Module) -> Any:
        """The same over another module of the model's form, whose parameters it reads."""
        other = self.__new__(type(self))
        shared = {name: model.__dict__[name] for name in SHARED}
        other.__dict__.update(
            {**self.__dict__, **shared, "_tome": replace(self._tome, model=model)}
        )
        return other

    def _tome_remade(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function that makes it again, and what it takes."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Captures are made again where they are needed. The user's hooks and attributes go along.
        kept = {name: value for name, value in self.__dict__.items() if name not in _REMADE}
        return (*self._tome_remade(), kept)

    # ---- saving ----------------------------------------------------------------------------

    def save_pretrained(self, directory: Any, **options: Any) -> Any:
        """Saves the model as usual, and beside it ``tomepass.json``: :func:`tomepass.load` reads
        both.

        Raises:
            TomeError: if the model has no ``save_pretrained`` of its own.
        """
        from tomepass.handover.standing_in.settings import save

        return save(self._tome.model, self._tome.method, self._tome.outputs, directory, **options)

    def push_to_hub(self, *args: Any, **options: Any) -> NoReturn:
        """Raises a TomeError that says how else: the model's own would leave the method behind."""
        from tomepass.handover.standing_in.settings import refuse_to_push

        refuse_to_push()

    def extra_repr(self) -> str:
        return f"merged by tomepass with {self._tome.method!r}"


def has_own(model: nn.Module, name: str) -> bool:
    """Whether a model has an attribute that not every module has."""
    if name in model.__dict__ or any(name in model.__dict__[part] for part in SHARED[:4]):
        return True
    return any(name in c.__dict__ for c in type(model).__mro__ if c not in nn.Module.__mro__)


def of_the_model(merged: StandIn, name: str) -> Any:
    """The model's attribute of a name; a method of it runs on the merged model."""
    from tomepass.handover.standing_in.bypass import called_through

    model = merged._tome.model
    value = getattr(model, name)
    if value is model:
        return merged
    if isinstance(value, types.MethodType):
        if isinstance(value.__self__, nn.Module):
            return called_through(merged, name, value)
    elif isinstance(value, (types.FunctionType, functools.partial)) and name in model.__dict__:
        return called_through(merged, name, value)
    return value


def shadowed(merged: StandIn) -> list[str]:
    """The names of ours that the model uses for something of its own."""
    names = {
        n for c in type(merged).__mro__ for n, v in vars(c).items() if isinstance(v, _GivesWay)
    }
    return sorted(name for name in names if has_own(merged._tome.model, name))


_classes: weakref.WeakValueDictionary[Any, type[Any]] = weakref.WeakValueDictionary()


def stand_in(kind: type[StandIn], model: nn.Module) -> type[Any]:
    """A class of a kind of stand-in that answers for the class of a model.

    It has that class's name and forward signature, gives it as ``__class__``, and has what that
    class has of its own in the place of what all modules have.
    """
    cls, signature = type(model), forward_signature(model)
    known = (kind, cls, str(signature))
    if (found := _classes.get(known)) is not None:
        return found

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args, fx.Proxy):
            raise no_tracing()  # torch.fx has one proxy for all of them
        return kind.forward(self, *args, **kwargs)

    receiver = inspect.Parameter("_tome", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [receiver, *signature.parameters.values()]
    forward.__doc__ = kind.forward.__doc__
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    body = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__class__": property(_class_of_the_model, _change_class_of_the_model),
        "forward": forward,
        **dict(_overridden(kind, cls)),
    }
    made = _classes[known] = type(cls.__name__, (kind,), body)
    return made


def _class_of_the_model(merged: StandIn) -> type[Any]:
    tome = merged.__dict__.get("_tome")
    return type(merged) if tome is None else type(tome.model)


def _change_class_of_the_model(merged: StandIn, cls: type[Any]) -> None:
    # A parametrization changes the class of the module that holds the parameter.
    merged._tome.model.__class__ = cls


def _overridden(kind: type[StandIn], cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """What a model's class does otherwise than all modules, and the kind does not do itself."""
    ours = {n for c in kind.__mro__ if c not in nn.Module.__mro__ for n in vars(c)}
    names = [n for n in dir(nn.Module) if not n.startswith("__")]
    for name in (*names, "__call__"):
        if name in ours or name == "forward":
            continue
        theirs = inspect.getattr_static(cls, name)
        if theirs is not inspect.getattr_static(nn.Module, name):
            yield name, theirs
    for name in _CONTAINER:
        if isinstance(own := inspect.getattr_static(cls, name, None), types.FunctionType):
            yield name, _on_the_model(own)


def _on_the_model(function: types.FunctionType) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_the_model(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        return function(self._tome.model, *args, **kwargs)

    return on_the_model
