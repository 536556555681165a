"""What operators composed of many others return, known without running these on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tomepass.ops.attending.log_size import log_size
from tomepass.ops.library import at_least_float32
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import keep


def _match_result(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    tokens = keys.shape[2]
    even = keys.new_empty((keys.shape[0], tokens + tokens % 2), dtype=torch.int64)
    return even[:, :tokens]  # an odd sequence is cut from an even one


def _merge_result(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> Tensor:
    return x.new_empty((x.shape[0], tokens, x.shape[2]))


def _log_size_result(size: Tensor, like: Tensor, dim: int = 3, fold: int = 1) -> Tensor:
    at_least_float32(like.dtype)  # raises where nothing wider is known, as the operator would
    shape: list[Any] = [1] * like.ndim
    images = size.shape[0] * fold if size.shape[0] != 1 else 1
    shape[0], shape[dim] = images, size.shape[1]
    return like.new_empty(shape)


def _keep_result(kept: Tensor | None, assign: Tensor, tokens: int, protected: list[int]) -> Tensor:
    return assign.new_empty((assign.shape[0], tokens))


def _merge_size_result(size: Tensor | None, assign: Tensor, tokens: int) -> Tensor:
    return assign.new_empty((assign.shape[0], tokens), dtype=torch.float32)


RESULTS: dict[Any, Callable[..., Tensor]] = {
    match: _match_result,
    merge: _merge_result,
    merge_size: _merge_size_result,
    keep: _keep_result,
    log_size: _log_size_result,
}
