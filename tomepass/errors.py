"""The errors of the pass, all a TomeError; and the place where errors nobody foresaw become one."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

_PACKAGE = str(Path(__file__).parent)

_RAISE = dis.opmap["RAISE_VARARGS"]

# By name, since torch need not be there to raise a TomeError.
_OUT_OF_MEMORY = {"MemoryError", "OutOfMemoryError"}


# What Dynamo steers by: it begins again, or leaves a frame alone.
DYNAMO_CONTROL = frozenset({"RestartAnalysis", "SkipFrame", "Unsupported"})


_REPORT = (
    "this is a fault of tomepass, not of the call: please report it with the whole traceback, "
    "which begins with its cause"
)


class TomeError(RuntimeError):
    """Something cannot be merged exactly, and says why.

    Args:
        reason: what was expected and what came.
        block: index of the transformer block, if one is concerned.
        node: name of the graph node.
        source: the model's source line behind that node.
        advice: what the user can do about it.
    """

    def __init__(
        self,
        reason: str,
        *,
        block: int | None = None,
        node: str | None = None,
        source: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.reason = reason
        self.block = block
        self.node = node
        self.source = source
        self.advice = advice
        super().__init__(self._message())

    def _message(self) -> str:
        where = [
            f"{label} {value}"
            for label, value in (("block", self.block), ("node", self.node), ("at", self.source))
            if value is not None
        ]
        message = self.reason
        if where:
            message += f" [{', '.join(where)}]"
        if self.advice:
            message += f"\n  What to do: {self.advice}"
        return message

    def __reduce__(self) -> tuple[object, ...]:
        fields = {
            "block": self.block,
            "node": self.node,
            "source": self.source,
            "advice": self.advice,
        }
        # A class that holds more, such as graphs, travels as the public one it is of.
        known = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        return _rebuild, (known, self.reason, fields)


class NotCaptured(TomeError):
    """No graph can stand for the model as it is called: nothing was read, nothing is merged.

    >>> import torch, tomepass
    >>> try:
    ...     tomepass.apply(torch.nn.Identity(), r=8, example_inputs={"input": 7})
    ... except tomepass.NotCaptured as error:
    ...     print(error.reason)
    no tensor among the inputs, so there is no batch to capture with
    """


class Refused(TomeError):
    """What is asked for cannot be done with this model exactly, so it is not done.

    >>> import torch, tomepass
    >>> try:
    ...     tomepass.apply(torch.nn.Linear(3, 3), r=8, example_inputs=torch.ones(2, 3))
    ... except tomepass.Refused as error:
    ...     print(error.reason)
    Linear cannot be merged: the graph holds no attention, so there are no tokens to merge
    """


class NotTrained(TomeError):
    """A method chooses tokens by a policy, and has none that was trained for this model.

    >>> import tomepass
    >>> try:
    ...     tomepass.DynamicViT(keep_rate=0.7).ready()
    ... except tomepass.NotTrained as error:
    ...     print(error.reason)
    DynamicViT scores tokens by a policy, and this one has none: it is not trained
    """


class NotExported(TomeError):
    """No program, or no file for a runtime, can be made of the merged model.

    >>> import torch, tomepass
    >>> try:
    ...     tomepass.export(torch.nn.Linear(3, 3), r=8, example_inputs=torch.ones(2, 3))
    ... except tomepass.NotExported as error:
    ...     print(error.advice)
    call model.eval() first
    """


def _rebuild(kind: type[TomeError], reason: str, fields: dict[str, object]) -> TomeError:
    return kind(reason, **fields)  # type: ignore[arg-type]


@contextmanager
def no_foreign_errors(
    doing: str, *, passing: frozenset[str] = frozenset(), advice: str = _REPORT
) -> Iterator[None]:
    """Makes a TomeError of an error that nobody foresaw; that error is its cause.

    These pass as they are: a TomeError; a TypeError or ValueError about an argument, which tomepass
    raises on purpose; what was raised under :func:`the_users_own`; what says that memory ran out;
    and all that is no ``Exception``, such as a keyboard interrupt. Serves as a decorator too.

    Args:
        doing: what could not be done, after "tomepass could not".
        passing: names of further classes that pass.
        advice: what the user can do about it.
    """
    try:
        yield
    except Exception as error:
        if (inside := getattr(error, "inner_exception", None)) and isinstance(inside, TomeError):
            raise inside from error  # Dynamo wraps what a backend raises
        if passes(error, passing):
            raise
        told = f"tomepass could not {doing}: {type(error).__name__}: {first_lines(error)}"
        raise TomeError(told, advice=advice) from error


def compiling_merged(inner: str) -> AbstractContextManager[None]:
    """Around a merged model's compilation, and runs of what that made: see no_foreign_errors.

    Args:
        inner: the name of the backend.
    """
    return no_foreign_errors(
        f"have the backend {inner!r} compile the merged model, or run what it made",
        advice="compile the model itself with that backend in one graph first: torch.compile("
        "model, backend=..., fullgraph=True); if that works, please report this with the whole "
        "traceback, which begins with its cause",
    )


@contextmanager
def the_users_own() -> Iterator[None]:
    """Around the user's iterables and callbacks: what they raise is theirs to see as it is."""
    try:
        yield
    except Exception as error:
        error.__dict__["_of_the_user"] = True
        raise


def first_lines(error: BaseException) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).strip().splitlines()[:3])[:500]


def passes(error: Exception, passing: frozenset[str] = frozenset()) -> bool:
    """Is it one that reaches the user as it is? See :func:`no_foreign_errors`."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, TomeError) or classes & (_OUT_OF_MEMORY | passing):
        return True
    if isinstance(error, (TypeError, ValueError)) and _on_purpose(error.__traceback__):
        return True
    return getattr(error, "_of_the_user", False) or "DefaultCPUAllocator" in str(error)


def _on_purpose(traceback: TracebackType | None) -> bool:
    """Did a ``raise`` of this package raise it, and no line that went wrong?"""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    return code.co_filename.startswith(_PACKAGE) and code.co_code[traceback.tb_lasti] == _RAISE
