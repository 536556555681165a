"""What typer lacks for this project's commands: ``--r 8 13 16``, and schedules as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from typer import Exit
from typer.core import TyperCommand

from tomepass.counts.schedule import Schedule, parse_schedule
from tomepass.errors import TomeError


def parse_dtype(name: str) -> Any:
    """``bf16``, ``fp16`` or ``fp32`` (or torch's own names) as a torch dtype."""
    import torch

    known = {
        **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
        **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
        **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
    }
    if name not in known:
        raise TomeError(f"unknown dtype {name!r}; known: bf16, fp16, fp32")
    return known[name]


_NUMBER = re.compile(r"-\.?\d")


@contextmanager
def errors_told(*more: type[Exception]) -> Iterator[None]:
    """Errors a user can mend are printed as such, without a traceback; exit status 2.

    Args:
        more: kinds of errors beside TomeError, TypeError and ValueError.
    """
    kinds: tuple[type[Exception], ...] = (TomeError, TypeError, ValueError, *more)
    try:
        yield
    except kinds as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {error}", style="red", markup=False, highlight=False
        )
        raise Exit(2) from error


class MultiValueCommand(TyperCommand):
    """A command whose list options take several values at once: ``--r 8 13 16``.

    Typer's own spelling, ``--r 8 --r 13``, keeps working. Every value up to the next option
    belongs to the list, so such a command should have no positional arguments.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Typer's parsing, after :func:`spread_values`."""
        several = {
            name
            for parameter in self.get_params(ctx)
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
        }
        rest: list[str] = super().parse_args(ctx, spread_values(args, several))
        return rest


def spread_values(args: Sequence[str], options: Collection[str]) -> list[str]:
    """Repeats an option before each of its values: ``--r 8 16`` becomes ``--r 8 --r 16``.

    Args:
        args: the command line, word by word.
        options: the options that take several values.
    """
    spread: list[str] = []
    current: str | None = None  # the option whose values are being read
    first = False  # does the next word follow the option itself?
    for place, word in enumerate(args):
        if word == "--":
            return [*spread, *args[place:]]
        if word.startswith("-") and len(word) > 1 and not _NUMBER.match(word):
            name, given, _ = word.partition("=")
            current = name if name in options else None
            first = not given
            spread.append(word)
        elif current is not None and not first:
            spread += [current, word]
        else:
            spread.append(word)
            first = False
    return spread


def parse_r(text: str) -> Schedule:
    """An ``r`` written on a command line.

    ``16`` is a count, ``16,16,8`` or ``[16,16,8]`` one count a block, ``(13,-1)`` a pair of a
    count and an inflection.

    Raises:
        TypeError, ValueError: on anything else, as :class:`tomepass.ToMe` does.
    """
    bare = text.strip()
    brackets = bare[:1] + bare[-1:]
    if brackets in ("()", "[]"):
        bare = bare[1:-1]
    values = [_number(part, text) for part in bare.split(",")]
    if brackets == "()":
        return parse_schedule(tuple(values))
    if brackets == "[]" or len(values) > 1:
        return parse_schedule(values)
    return parse_schedule(values[0])


def _number(part: str, text: str) -> int | float:
    try:
        return int(part)
    except ValueError:
        pass
    try:
        return float(part)
    except ValueError:
        raise ValueError(
            f"r is a count like 16, a list like 16,16,8 or a pair like (13,-1), got {text!r}"
        ) from None
