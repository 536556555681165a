"""The name of version 0.1 for :mod:`tomepass.formats.openvino_ir`."""

from __future__ import annotations

import warnings

from tomepass.formats.openvino_ir import token_products

__all__ = ["token_products"]

warnings.warn(f"{__name__} is tomepass.formats.openvino_ir now", DeprecationWarning, stacklevel=2)
