"""DiffRate: prune the least attended tokens and merge the next, at rates found by search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tomepass.counts.schedule import TARGETS, CountsError
from tomepass.methods.dropping.prune import Pruning
from tomepass.methods.fields import number, whole

if TYPE_CHECKING:
    from tomepass.counts.blocks import StreamPlan
    from tomepass.methods.base import Method
    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


@dataclass(frozen=True, repr=False, kw_only=True)
class DiffRate(Pruning):
    """Differentiable compression rate (DiffRate, arXiv 2305.17997): prune and merge in a block.

    Tokens are sorted by what the class token pays them (where there is none, by what all pay). Of
    the r that go, the last are pruned; those before them each merge into the most similar of the
    tokens that stay, by the cosine of the residual stream. The paper learns the counts by
    gradient; :func:`tomepass.calibrate` searches them.

    Args:
        pruned: of the r tokens, the share that is pruned in every block (rounded down); or for
            each block a share (a float) or a count (an int, of no more than the block loses).

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "diffrate"

    pruned: float | tuple[int | float, ...] = 0.5

    def check(self) -> None:
        """Normalises shares and counts, and refuses counts where those of the plan are open."""
        if not isinstance(self.pruned, (tuple, list)):
            self._set(pruned=number("pruned", self.pruned, 0, 1))
            return
        self._set(pruned=tuple(_pruned(value) for value in self.pruned))
        if self.adaptive:
            self._refuse_counts("adaptive=... takes shares of r")
        if self.schedule.kind in ("keep_rate", *TARGETS):
            self._refuse_counts(f"{self.schedule!r} leaves r open")

    @property
    def lossy(self) -> str:
        """Where something is pruned."""
        pruned = any(self.pruned) if isinstance(self.pruned, tuple) else self.pruned
        return super().lossy if pruned else ""

    def plan(self, tokens: int, protected: tuple[int, ...], depth: int) -> StreamPlan:
        """The plan step: see :meth:`Method.plan`.

        Raises:
            ValueError: also if ``pruned`` is for another depth, or prunes more than is to go.
        """
        if isinstance(self.pruned, tuple):
            self._refuse_misfits(self.pruned, depth)
        return super().plan(tokens, protected, depth)

    def pruned_in(self, index: int, r: int) -> int:
        """How many of ``r`` tokens block ``index`` prunes."""
        pruned = self.pruned[index] if isinstance(self.pruned, tuple) else self.pruned
        # A small image may lose fewer than was asked for.
        return min(r, pruned) if isinstance(pruned, int) else int(pruned * r)

    def measured(self, linearity: tuple[float, ...]) -> DiffRate:
        """Itself; counts would not fit those that are tried."""
        self._refuse_counts("a calibration finds r")
        return self

    def variants(self, linearity: tuple[float, ...]) -> tuple[Method, ...]:
        """Other shares: one for all blocks; more in late, in early, in the least or in the most
        linear blocks; and these moved, a quarter of the blocks at a time.
        """
        depth = len(linearity)
        last = max(1, depth - 1)
        bent = sorted(range(depth), key=lambda i: -linearity[i])
        rising = [round(i / last, 2) for i in range(depth)]
        by_bend = [rising[bent.index(i)] for i in range(depth)]
        profiles = [part for ramp in (rising, by_bend) for part in (ramp, [1 - s for s in ramp])]
        moved = self._moved(depth)
        shares = (0.0, 0.25, 0.5, 0.75, *(tuple(profile) for profile in (*profiles, *moved)))
        return tuple(self.replace(pruned=share) for share in shares)

    def _moved(self, depth: int) -> list[list[float]]:
        """Shares that differ from these by a quarter in a quarter of the blocks, side by side."""
        own = self.pruned if isinstance(self.pruned, tuple) else (self.pruned,) * depth
        found = []
        for part in range(4):
            for step in (-0.25, 0.25):
                inside = range(part * depth // 4, (part + 1) * depth // 4)
                shares = [
                    min(max(share + step, 0.0), 1.0) if i in inside else float(share)
                    for i, share in enumerate(own)
                ]
                found += [shares] if tuple(shares) != own and inside else []
        return found

    def __eq__(self, other: object) -> bool:
        # As JSON, where a count of 1 is not a share of 1.0.
        return isinstance(other, DiffRate) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def _refuse_counts(self, why: str) -> None:
        if isinstance(self.pruned, tuple) and any(isinstance(p, int) and p for p in self.pruned):
            raise ValueError(
                f"pruned={self.pruned} counts tokens, and {why}: give shares, such as 0.5, instead"
            )

    def _refuse_misfits(self, pruned: tuple[int | float, ...], depth: int) -> None:
        if len(pruned) != depth:
            raise CountsError(
                f"pruned={pruned} is for {len(pruned)} blocks and the model has {depth}: give one "
                "share or count for each"
            )
        if self.schedule.kind in ("keep_rate", *TARGETS):
            return
        asked = self.counts(depth)
        if not any(asked):  # switched off
            return
        for index, (part, r) in enumerate(zip(pruned, asked, strict=True)):
            if isinstance(part, int) and part > r:
                raise CountsError(
                    f"pruned={pruned} prunes {part} tokens in block {index}, where "
                    f"{self.schedule!r} lets {r} go"
                )

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Prunes the tail of the order, and merges the next into the head."""
        pruned, head = self.pruned_in(block.index, block.r), block.left - len(block.protected)
        order = block.call("order_by", block.class_attention, block.protected, block.masked_size)
        last = block.tokens - len(block.protected)
        sources = block.slice(order, head, last)
        rest = (block.r, block.protected, block.masked_size, "cosine")
        matched = block.matched(
            "match_sets",
            block.side_by_side(block.hidden),
            sources,
            block.slice(order, 0, head),
            *rest,
        )
        if not pruned:
            return matched
        dropped = block.slice(order, last - pruned, last)
        holds = block.call("let_go", matched.assign, dropped)
        weight = block.call("counted", block.size, dropped, block.tokens)
        size = block.call("merge_size", weight, matched.assign, block.left)
        return replace(matched, holds=holds, weight=weight, size=size)


def _pruned(value: object) -> int | float:
    return number("pruned", value, 0, 1) if isinstance(value, float) else whole("pruned", value)
