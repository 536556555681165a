"""tomepass: Vision Transformers made faster by merging redundant tokens, as a compiler pass.

    merged = tomepass.apply(model, r=16)
    fast = torch.compile(model, backend=tomepass.tome_backend)

Importing the package is light: names load what they need on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tomepass.version import VERSION

if TYPE_CHECKING:
    from tomepass.calibration.fastest import plan
    from tomepass.calibration.searching import calibrate
    from tomepass.calibration.thresholds import calibrate_tau
    from tomepass.calibration.training import train_policy
    from tomepass.calibration.values import Calibration, Plan
    from tomepass.errors import NotCaptured, NotExported, NotTrained, Refused, TomeError
    from tomepass.formats.exporting import export
    from tomepass.formats.loading import load
    from tomepass.handover.applying import apply, explain
    from tomepass.handover.compiling.backend import TomeBackend, tome_backend
    from tomepass.handover.merged import MergedModel
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
    from tomepass.proof.check import check
    from tomepass.proof.report import CheckReport
    from tomepass.reporting.report import Report


__version__ = VERSION

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
    "NotCaptured",
    "NotExported",
    "NotTrained",
    "PiToMe",
    "Plan",
    "Policy",
    "Prune",
    "Refused",
    "Report",
    "SPViT",
    "Threshold",
    "ToFu",
    "ToMe",
    "TomeBackend",
    "TomeError",
    "apply",
    "calibrate",
    "calibrate_tau",
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
    "Calibration": "calibration.values",
    "CheckReport": "proof.report",
    "DiffRate": "methods",
    "DynamicViT": "methods",
    "EViT": "methods",
    "MergedModel": "handover.merged",
    "Method": "methods",
    "NotCaptured": "errors",
    "NotExported": "errors",
    "NotTrained": "errors",
    "PiToMe": "methods",
    "Plan": "calibration.values",
    "Policy": "methods",
    "Prune": "methods",
    "Refused": "errors",
    "Report": "reporting.report",
    "SPViT": "methods",
    "Threshold": "methods",
    "ToFu": "methods",
    "ToMe": "methods",
    "TomeBackend": "handover.compiling.backend",
    "TomeError": "errors",
    "apply": "handover.applying",
    "calibrate": "calibration.searching",
    "calibrate_tau": "calibration.thresholds",
    "check": "proof.check",
    "explain": "handover.applying",
    "export": "formats.exporting",
    "load": "formats.loading",
    "plan": "calibration.fastest",
    "tome_backend": "handover.compiling.backend",
    "train_policy": "calibration.training",
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
