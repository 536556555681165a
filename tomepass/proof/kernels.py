"""The kernels of a CUDA graph held against the plain reference, on what a run gives them.

The other lines of ``check`` read the graph of composite operators, or run the same kernels twice:
one that is wrong, and wrong every time, passes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tomepass import reference
from tomepass.handover.applied import Applied
from tomepass.kernels.gpu.match import match_triton
from tomepass.kernels.gpu.merge import merge_norm_triton, merge_triton, unmerge_triton
from tomepass.ops.attending.attend import attend_channel, attend_cudnn, attend_scaled
from tomepass.ops.padding import PADDED
from tomepass.proof.recorded import TIE, tolerance_of
from tomepass.proof.replay import Call, Recorder, relative_error
from tomepass.proof.report import CheckLine

# Three products of TensorFloat-32 round more than one of float32.
_TIE_IN_THREE = 5e-6


def kernel_lines(applied: Applied, values: list[Any]) -> Iterator[CheckLine]:
    """A line on the matches and one on the rest; none where a graph has no kernels for CUDA.

    Args:
        applied: the model for one call signature.
        values: its state, then the inputs.
    """
    if applied.on_device is None:
        return
    recorder = Recorder(applied.on_device, (match_triton, *_ERRORS))
    recorder.run(*values)
    matches = recorder.calls_of(match_triton)
    if matches:
        wrong = sum(_wrong_images(call) for call in matches)
        name, note = "   kernels: matches against the reference", f"{len(matches)} matches"
        yield CheckLine(name, float(wrong), 0.0, wrong == 0, note)
    others = [
        (_ERRORS[call.node.target](call), _bound(call)) for call in recorder.calls_of(*_ERRORS)
    ]
    if others:
        worst, tolerance = (max(found) for found in zip(*others, strict=True))
        passed = all(error <= bound for error, bound in others)
        name, note = "   kernels: the rest against the reference", f"{len(others)} calls"
        yield CheckLine(name, worst, tolerance, passed, note)


def _bound(call: Call) -> float:
    result = call.result if isinstance(call.result, Tensor) else call.result[0]
    return tolerance_of(result.dtype)


def _wrong_images(call: Call) -> int:
    """Images matched otherwise than by the reference, but for ties within rounding."""
    keys, r, protected, *rest = call.args
    padding = rest[0] < PADDED if rest and rest[0] is not None else None
    plain = reference.match(keys, r, tuple(protected), padding=padding)
    differ = (call.result != plain).any(1)
    if not bool(differ.any()):
        return 0
    hidden = None if padding is None else padding[differ]
    margin = reference.match_margin(keys[differ], r, tuple(protected), padding=hidden)
    return int((margin > (TIE if keys.dtype is torch.float32 else _TIE_IN_THREE)).sum())


def _merge_error(call: Call) -> float:
    x, added, size, assign, *norm = call.args
    merged, total, *normed = call.result
    # A sum before a merge is rounded as it is by itself.
    x = x if added is None else x + added
    size = torch.ones(x.shape[:2], device=x.device) if size is None else size
    plain, sizes = reference.merge(x.double(), size, assign, merged.shape[1])
    errors = [relative_error(merged, plain), relative_error(total, sizes)]
    if normed:
        weight, bias, eps = norm[2:]
        wide = merged.double(), weight.shape, weight.double(), bias.double(), eps
        errors.append(relative_error(normed[0], torch.nn.functional.layer_norm(*wide)))
    return max(errors)


def _unmerge_error(call: Call) -> float:
    x, source = call.args
    return relative_error(call.result, reference.unmerge(x, source))


def _attention_error(call: Call) -> float:
    query, key, value, size, scale = call.args
    wide = query.double(), key.double(), value.double()
    return relative_error(call.result, reference.proportional_attention(*wide, size, scale))


_ERRORS: dict[Any, Callable[[Call], float]] = {
    merge_triton: _merge_error,
    merge_norm_triton: _merge_error,
    unmerge_triton: _unmerge_error,
    attend_channel: _attention_error,
    attend_scaled: _attention_error,
    attend_cudnn: _attention_error,
}
