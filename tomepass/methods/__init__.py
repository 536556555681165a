"""Reduction methods: one file each, all lowered to the same ``tome::`` operators and plan."""

from __future__ import annotations

from typing import Any

from tomepass.methods.ats import ATS
from tomepass.methods.avit import AViT
from tomepass.methods.base import Method, RLike, method_from_dict
from tomepass.methods.diffrate import DiffRate
from tomepass.methods.fuse import EViT, SPViT
from tomepass.methods.learned import AdaViT, DynamicViT, Learned
from tomepass.methods.pitome import PiToMe
from tomepass.methods.policy import Policy
from tomepass.methods.prune import Prune
from tomepass.methods.reduction import MLERP
from tomepass.methods.threshold import Threshold, calibrate_tau
from tomepass.methods.tofu import ToFu
from tomepass.methods.tome import ToMe

__all__ = [
    "ATS",
    "MLERP",
    "AViT",
    "AdaViT",
    "DiffRate",
    "DynamicViT",
    "EViT",
    "Learned",
    "Method",
    "PiToMe",
    "Policy",
    "Prune",
    "RLike",
    "SPViT",
    "Threshold",
    "ToFu",
    "ToMe",
    "calibrate_tau",
    "method_from_dict",
    "resolve_method",
]


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
