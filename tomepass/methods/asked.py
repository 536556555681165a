"""The method that a user asks for: `r=`, a method, a plan or a saved calibration."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from tomepass.methods.base import Method, RLike
from tomepass.methods.merging.tome import ToMe


class HasMethod(Protocol):
    """What holds a method, as a :class:`tomepass.Plan` does."""

    @property
    def method(self) -> Method:
        """What is to be done."""
        ...


MethodLike: TypeAlias = Method | HasMethod
"""What is taken as ``method=``: a method, or a plan."""


def resolve_method(
    method: Any, r: RLike | None = None, *, standing: Method | None = None, **targets: float | None
) -> Method:
    """The method a call asks for; where it asks for none, that of a merged model, or ``ToMe()``.

    Args:
        method: a method, a plan, or None.
        r: short for ``method=ToMe(r=r)``.
        standing: what is done already, where that is to be kept.
        targets: ``keep_rate``, ``macs`` and ``speedup``, short for ``ToMe`` with them.

    Raises:
        TypeError: if more than one of all these is given, or ``method`` is not a method.
        ValueError: if a target is out of its range.
    """
    given = {name: v for name, v in {"r": r, **targets}.items() if v is not None}
    if method is None:
        return standing if standing is not None and not given else ToMe(**given)  # type: ignore[arg-type]
    if given:
        name, value = next(iter(given.items()))
        raise TypeError(
            f"give either method= or {name}=, not both: {name}={value!r} is short for "
            f"method=ToMe({name}={value!r})"
        )
    method = getattr(method, "method", method)  # of a plan
    if not isinstance(method, Method):
        raise TypeError(f"method must be a tomepass method such as ToMe(r=16), got {method!r}")
    return method
