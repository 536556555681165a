"""tomepass: Vision Transformers made faster by merging redundant tokens, as a compiler pass.

    merged = tomepass.apply(model, r=16)
    fast = torch.compile(model, backend=tomepass.tome_backend)

Importing the package is light: names load what they need on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tomepass.backend import TomeBackend, tome_backend
    from tomepass.calibration import Calibration, calibrate
    from tomepass.equivalence import CheckReport, check
    from tomepass.errors import TomeError
    from tomepass.exporting import export
    from tomepass.methods import (
        ATS,
        MLERP,
        AdaViT,
        AViT,
        DiffRate,
        DynamicViT,
        EViT,
        Method,
        PiToMe,
        Policy,
        Prune,
        SPViT,
        Threshold,
        ToFu,
        ToMe,
    )
    from tomepass.module import MergedModel, apply, explain
    from tomepass.plans import Plan, plan
    from tomepass.report import Report
    from tomepass.saving import load
    from tomepass.training import train_policy

__version__ = "0.1.0"

__all__ = [
    "ATS",
    "MLERP",
    "AViT",
    "AdaViT",
    "Calibration",
    "CheckReport",
    "DiffRate",
    "DynamicViT",
    "EViT",
    "MergedModel",
    "Method",
    "PiToMe",
    "Plan",
    "Policy",
    "Prune",
    "Report",
    "SPViT",
    "Threshold",
    "ToFu",
    "ToMe",
    "TomeBackend",
    "TomeError",
    "apply",
    "calibrate",
    "check",
    "explain",
    "export",
    "load",
    "plan",
    "tome_backend",
    "train_policy",
]

_HOME = {
    "ATS": "methods",
    "MLERP": "methods",
    "AViT": "methods",
    "AdaViT": "methods",
    "Calibration": "calibration",
    "CheckReport": "equivalence",
    "DiffRate": "methods",
    "DynamicViT": "methods",
    "EViT": "methods",
    "MergedModel": "module",
    "Method": "methods",
    "PiToMe": "methods",
    "Plan": "plans",
    "Policy": "methods",
    "Prune": "methods",
    "Report": "report",
    "SPViT": "methods",
    "Threshold": "methods",
    "ToFu": "methods",
    "ToMe": "methods",
    "TomeBackend": "backend",
    "TomeError": "errors",
    "apply": "module",
    "calibrate": "calibration",
    "check": "equivalence",
    "explain": "module",
    "export": "exporting",
    "load": "saving",
    "plan": "plans",
    "tome_backend": "backend",
    "train_policy": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
