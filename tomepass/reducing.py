"""The name of version 0.1 for :mod:`tomepass.methods.block`."""

from __future__ import annotations

import warnings

from tomepass.methods.block import ReducingBlock as Reducing

__all__ = ["Reducing"]

warnings.warn(f"{__name__} is tomepass.methods.block now", DeprecationWarning, stacklevel=2)
