"""Where the counts of a schedule go: a few shapes, each scaled to a share of the MACs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tomepass.methods import Method
from tomepass.planning.solving import Share

_STEPS = 40  # of a bisection: far below one token


@dataclass(frozen=True)
class Shape:
    """How the tokens that go are spread over the blocks.

    Block i loses tokens in proportion to ``N_i ** power``, N_i its unprotected tokens.

    Args:
        start: blocks at the front that lose none.
        ramp: whether the first block that loses some loses half.
        power: 0 spreads evenly, 1 takes the same share of what is left each time.
        last: what the last block loses: ``"same"`` as its place says, ``"none"``, or the ``"most"``
            the method can: what reads the class token alone never sees its other tokens again.
    """

    start: int = 0
    ramp: bool = False
    power: float = 0.0
    last: str = "same"

    def neighbours(self, depth: int) -> list[Shape]:
        """Shapes one step away, in a fixed order."""
        found = [replace(self, last=last) for last in ("same", "none", "most")]
        found += [replace(self, ramp=not self.ramp)]
        found += [replace(self, start=self.start + step) for step in (-1, 1)]
        found += [replace(self, power=self.power + step) for step in (-0.25, 0.25)]
        return [s for s in found if s != self and 0 <= s.start < depth - 1 and 0 <= s.power <= 2]

    def counts(self, scale: float, method: Method, tokens: int, held: int, depth: int) -> list[int]:
        """Tokens each block loses; ``scale`` is the share that the first of them loses."""
        free, counts = tokens - held, []
        whole = free
        for index in range(depth):
            most = method.most(held + free, tuple(range(held)))
            part = 0.5 if self.ramp and index == self.start else 1.0
            r = round(part * scale * whole * (free / whole) ** self.power)
            left_out = method.blocks is not None and index not in method.blocks
            if left_out or index < self.start or (index == depth - 1 and self.last == "none"):
                r = 0
            elif index == depth - 1 and self.last == "most":
                r = most
            counts.append(min(r, most))
            free -= counts[-1]
        return counts


def fitted(
    shape: Shape, method: Method, macs: float, share: Share, tokens: int, held: int, depth: int
) -> Method | None:
    """A method with counts in a shape, at the most multiply-accumulates that are allowed.

    Args:
        macs: the share of the unmerged ones.
        share: what a method leaves of them.
        tokens: entering the stream.
        held: protected ones among them.

    Returns:
        None where the shape cannot save so much.
    """

    def at(scale: float) -> Method:
        return method.replace(r=shape.counts(scale, method, tokens, held, depth))

    low, high = 0.0, 1.0
    if share(at(high)) > macs:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if share(at(middle)) <= macs else (middle, high)
    return filled(at(high), macs, share)


def filled(method: Method, macs: float, share: Share) -> Method:
    """A method that gives tokens back, block by block, as long as it keeps at most ``macs``.

    One without counts, of a rate alone, has none to give back and stays as it is.
    """
    if method.schedule.kind != "list":
        return method
    counts = [int(count) for count in method.schedule.values]
    for index in range(len(counts)):
        while counts[index]:
            fewer = [*counts[:index], counts[index] - 1, *counts[index + 1 :]]
            if share(method.replace(r=fewer)) > macs:
                break
            counts = fewer
    return method.replace(r=counts)
