"""What a policy is trained to lower: distance to the unmerged model, and to the shares planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tomepass.capture.captured import Capture
from tomepass.graphs.nodes import shape_of
from tomepass.planning.streams import PlannedStream
from tomepass.reading.axis import Axis


@dataclass(frozen=True)
class _Tokens:
    """Where among a model's outputs its tokens are.

    Args:
        output: the index of the flat output ``[B, N, C]``.
        free: in its order, the positions of tokens that are not protected.
    """

    output: int
    free: tuple[int, ...]

    def distance(self, student: Sequence[Any], teacher: Sequence[Any], mask: Tensor) -> Tensor:
        """Of the tokens left (DynamicViT, section 3.3)."""
        ours, theirs = (side[self.output][:, list(self.free)] for side in (student, teacher))
        squared = (ours.float() - theirs.float()).square().mean(-1)
        mean: Tensor = (squared * mask).sum() / mask.sum().clamp(min=1)
        return mean


def returned_tokens(capture: Capture, stream: PlannedStream) -> _Tokens | None:
    """The last token sequence of a stream that the model returns."""
    (outputs,) = capture.graph.graph.output_node().args
    layouts, protected = stream.flow.layouts, stream.plan.protected
    found = []
    for index, node in enumerate(outputs):  # type: ignore[arg-type]
        layout = layouts.get(node)
        if layout is None or not layout.plain or layout.tokens != Axis(1):
            continue
        free = [place for place, p in enumerate(layout.positions) if p not in protected]
        whole = len(free) == stream.plan.tokens - len(protected)
        if whole and len(layout.axes) == 1 and len(shape_of(node)) == 3:
            found.append((node, index, tuple(free)))
    if not found:
        return None
    _, index, free_places = max(found)
    return _Tokens(index, free_places)


def rate_loss(masks: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """How far the shares kept are from those planned, squared (DynamicViT, section 3.3)."""
    pairs = zip(masks, rates, strict=True)
    return torch.stack([(mask.mean(-1) - rate).square().mean() for mask, rate in pairs]).mean()


def divergence(logits: Tensor, whole: Tensor) -> Tensor:
    """KL of the whole model's classes from the reduced one's (DynamicViT, section 3.3)."""
    ours, theirs = (value.float().log_softmax(-1) for value in (logits, whole))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
