"""What a method answers for a block: how its tokens become fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tomepass.methods.fields import choice

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class MLERP:
    """Combine tokens into a mean direction with a preserved norm (ToFu, arXiv 2312.01026).

    Args:
        norm: ``"max"``, the weighted mean at the greatest norm among its tokens; ``"mean"``, the
            mean of the directions at the mean of the norms, both weighted by size.
    """

    norm: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        choice("norm", self.norm, ("max", "mean"))

    def to_json_types(self) -> dict[str, str]:
        """As JSON types."""
        return {"mlerp": self.norm}


@dataclass(frozen=True)
class Reduction:
    """How a block's tokens become fewer. All fields are nodes of the graph being written.

    Args:
        assign: ``[B, N]`` int64, where each token goes in the sequence of N'; of a token that is
            dropped, the one that stands in for it when tokens are unmerged.
        chosen: the operator that decided, for the harness; None where there is none to check.
        stands: ``[B, N']`` int64, the position of the token that stands at each place; None:
            of several the one on an odd position, the destination of ``tome::match``.
        combine: how tokens become one, as in :class:`tomepass.ToMe`.
        weight: ``[B, N]`` float32, in the weighted mean instead of the sizes.
        size: ``[B, N']`` float32 afterwards; None: the sums.
        holds: ``[B, N]`` int64, ``assign`` with -1 for tokens that are dropped, or left in a place
            out of use; None: none is.
    """

    assign: fx.Node
    chosen: fx.Node | None = None
    stands: fx.Node | None = None
    combine: str | MLERP = "weighted_mean"
    weight: fx.Node | None = None
    size: fx.Node | None = None
    holds: fx.Node | None = None
