"""Reduction methods: one file each, all lowered to the same ``tome::`` operators and plan.

May import: counts, errors.
Start reading: ``base.py``, what every method is; ``block.py``, what a method sees of a block;
``merging/tome.py``, the first of them.
"""

from __future__ import annotations

from typing import Any

from tomepass.methods.asked import MethodLike, resolve_method
from tomepass.methods.base import Method, RLike, method_from_dict
from tomepass.methods.dropping.ats import ATS
from tomepass.methods.dropping.avit import AViT
from tomepass.methods.dropping.diffrate import DiffRate
from tomepass.methods.dropping.evit import EViT, SPViT
from tomepass.methods.dropping.prune import Prune
from tomepass.methods.learned.policies import AdaViT, DynamicViT, Learned
from tomepass.methods.learned.policy import Policy
from tomepass.methods.merging.pitome import PiToMe
from tomepass.methods.merging.threshold import Threshold
from tomepass.methods.merging.tofu import ToFu
from tomepass.methods.merging.tome import ToMe
from tomepass.methods.reduction import MLERP

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
    "MethodLike",
    "PiToMe",
    "Policy",
    "Prune",
    "RLike",
    "SPViT",
    "Threshold",
    "ToFu",
    "ToMe",
    "method_from_dict",
    "resolve_method",
]


def __getattr__(name: str) -> Any:
    if name != "calibrate_tau":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import warnings

    # The name of version 0.1; what it names stands on a floor above, so that nothing here needs it.
    warnings.warn(f"{__name__}.{name} is tomepass.{name} now", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("tomepass"), name)
