"""What the token analysis answers: how a value holds tokens, and what each reader does to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from tomepass.axis import Axis


@dataclass(frozen=True)
class Layout:
    """How a value holds tokens.

    Args:
        tokens: the token axis; of attention scores, the queries'.
        batch: the batch axis.
        positions: the original positions the value covers, ascending.
        columns: the second token axis of attention scores: the keys'.
        weights: softmax has made it attention weights: summed over the keys they are one.
    """

    tokens: Axis
    batch: Axis
    positions: tuple[int, ...]
    columns: Axis | None = None
    weights: bool = False

    @property
    def plain(self) -> bool:
        """Batch first and no axis folded: what ``tome::`` operators take."""
        first = self.batch == Axis(0) and self.tokens.dim > 0
        return first and all(axis.whole for axis in self.axes)

    @property
    def keys(self) -> Axis:
        """The axis a softmax over tokens runs along."""
        return self.tokens if self.columns is None else self.columns

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The token axes: one, or two for attention scores."""
        return (self.tokens,) if self.columns is None else (self.tokens, self.columns)


@dataclass(frozen=True)
class Side:
    """An operand, not made from tokens, that holds one row a token.

    Args:
        node: the operand.
        how: what merged tokens meet: the ``"mean"`` of its rows (it is added), the row of the
            token merged into (``"kept"``: it multiplies, as a rotary table does), or a
            ``"bias"`` of attention scores: mean over rows, log-mean-exp over columns. A mask that
            hides ``"nothing"`` is left out. What was ``"read"`` off the tokens themselves, by
            position, cannot come back to merged ones.
        factor: what a bias is multiplied by before the softmax takes its exponential: -1 where it
            is subtracted, and where scores are scaled after it was added, their scale.
    """

    node: fx.Node
    how: Literal["mean", "kept", "bias", "nothing", "read"]
    factor: float = 1.0


@dataclass(frozen=True)
class Carried:
    """The result holds the same tokens.

    Args:
        layout: of the result.
        sizes: which entries of the operator's shape argument count tokens, and along which axis.
        sides: operands with rows of their own that meet the tokens.
    """

    layout: Layout
    sizes: tuple[tuple[int, Axis], ...] = ()
    sides: tuple[Side, ...] = ()


@dataclass(frozen=True)
class Taken:
    """Some positions are read: protected ones alone, or all the others with them.

    Args:
        positions: original positions taken, ascending.
        dim: the token dimension of the operand.
        layout: of the result, None where only protected tokens are left.
        drops: the token dimension disappears (a select).
    """

    positions: tuple[int, ...]
    dim: int
    layout: Layout | None
    drops: bool


@dataclass(frozen=True)
class Divided:
    """A split along the tokens, each piece of which may be :class:`Taken`; layout: before it."""

    pieces: tuple[tuple[int, ...], ...]
    layout: Layout


@dataclass(frozen=True)
class Joined:
    """A ``cat`` of protected tokens and the others, back into one sequence.

    Args:
        layout: of the result.
        parts: the original positions of each operand.
    """

    layout: Layout
    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Averaged:
    """A mean over all tokens of the operand: weighted by size once tokens have merged."""

    dim: int
    keepdim: bool


@dataclass(frozen=True)
class Attended:
    """A fused attention whose keys are all tokens.

    Args:
        layout: of the result, None where the queries are no tokens of the stream (pooling).
        keys: of the keys and values.
        bias: a position bias among the tokens.
        padding: a mask that hides some tokens from all others.
    """

    layout: Layout | None
    keys: Layout
    bias: fx.Node | None = None
    padding: fx.Node | None = None


@dataclass(frozen=True)
class Weighed:
    """A softmax over all tokens: sizes belong into it. ``layout`` is of the result."""

    layout: Layout


@dataclass(frozen=True)
class Contracted:
    """A sum over all tokens with attention weights: exact as it stands, no tokens are left."""


@dataclass(frozen=True)
class Positional:
    """The operator reads tokens by position: unmerge first."""

    reason: str


@dataclass(frozen=True)
class Masked(Positional):
    """An attention in which not every token sees, or may not see, every other: unmerge first."""

    advice: str


Outcome = (
    Carried | Taken | Divided | Joined | Averaged | Attended | Weighed | Contracted | Positional
)
