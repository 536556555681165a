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


def resolve_method(method: Any, r: RLike | None) -> Method:
    """The method a call asks for: ``r=`` is short for ``ToMe(r=...)``, neither is ``ToMe()``.

    Raises:
        TypeError: if both are given, or ``method`` is not a method.
    """
    if method is not None and r is not None:
        raise TypeError("give either method= or r=, not both: r=8 is short for method=ToMe(r=8)")
    if method is None:
        return ToMe() if r is None else ToMe(r)
    method = getattr(method, "method", method)  # of a plan
    if not isinstance(method, Method):
        raise TypeError(f"method must be a tomepass method such as ToMe(r=16), got {method!r}")
    return method
