"""What the kernels for CUDA share.

They mean what the composite operators of :mod:`tomepass.ops` mean, which stay the reference, the
fallback and what is exported. Triton is imported by the first call. Without a GPU it can interpret
them (``TRITON_INTERPRET=1``), slowly: that is how they are tested.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tomepass.errors import TomeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What graphs take the kernels for."""


# What the smallest devices let one program share, where the device cannot be asked.
_SHARED_MEMORY = 99 * 1024


def power(number: int) -> int:
    """The next power of two."""
    return 1 << max(number - 1, 0).bit_length()


def with_rows(x: Tensor) -> Tensor:
    """With channels side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def wide(dtype: torch.dtype) -> Any:
    """What a kernel sums in, as Triton calls it."""
    import triton.language as tl

    return tl.float64 if dtype is torch.float64 else tl.float32


def on_device(x: Tensor) -> Any:
    """Launches go to the device of a tensor."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may share."""
    if not torch.cuda.is_available():
        return _SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _SHARED_MEMORY))


def interpreted() -> bool:
    """Does Triton run its kernels in Python?"""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def need_triton(x: Tensor) -> None:
    """Raises a TomeError on a CPU, unless Triton interprets."""
    if x.device.type == "cpu" and not interpreted():
        raise TomeError(
            "Triton's kernels run on CUDA devices, this tensor is on the CPU",
            advice="set TRITON_INTERPRET=1 before Triton is imported to run them in its "
            "interpreter, or call the composite operator of the same meaning",
        )
