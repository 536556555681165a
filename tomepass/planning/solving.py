"""One number that keeps a share of the multiply-accumulates: the same count in every block."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from tomepass.errors import Refused
from tomepass.methods import Method

Share = Callable[[Method], float]


def even(method: Method, macs: float, share: Share, tokens: int, depth: int) -> Method:
    """A method with its own spread of counts: the smallest step that reaches a share of the MACs.

    Args:
        macs: the share to keep at most.
        share: what a method leaves.
        tokens: entering the stream.
        depth: its blocks.

    Raises:
        TomeError: if all it can do is not enough.
    """

    def left(step: int) -> float:
        return share(method.step(step, tokens, depth))

    most = tokens * depth
    if left(most) > macs:
        asked = f"macs={macs:.3g}" if method.schedule.macs is None else repr(method.schedule)
        raise Refused(
            f"{asked} cannot be reached: the most that {type(method).__name__} can do leaves "
            f"{left(most):.3f} of the multiply-accumulates",
            advice=f"ask for macs={math.ceil(left(most) * 1000) / 1000} or more",
        )
    step = bisect.bisect_left(range(most + 1), -macs, key=lambda s: -left(s))
    return method.step(step, tokens, depth)
