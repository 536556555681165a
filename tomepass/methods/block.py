"""What the author of a method sees of a block that is to lose tokens."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tomepass.methods.reduction import MLERP, Reduction

if TYPE_CHECKING:
    from torch import fx


aten = torch.ops.aten


@dataclass
class ReducingBlock(ABC):
    """One block, while the graph is rewritten: what may be read, and operators to call.

    All tensors are nodes of the graph that is written, ``[B, ...]`` batch first. ``tome::``
    operators are called by name.

    Args:
        index: of the block.
        depth: blocks of the stream.
        tokens: N, there are now.
        r: tokens to lose; 0 for a method of ``every_block`` alone.
        protected: positions now that stay, the class token first where there is one.
        memory: what a method keeps from block to block of a stream, nodes by name.
    """

    index: int
    depth: int
    tokens: int
    r: int
    protected: list[int]
    memory: dict[str, fx.Node]

    # ---- what there is to read ---------------------------------------------------------------

    @property
    @abstractmethod
    def hidden(self) -> fx.Node:
        """The residual stream ``[B, N, C]``, after the block's attention."""

    @property
    @abstractmethod
    def size(self) -> fx.Node | None:
        """``[B, N]`` float32: original tokens each one holds; None while all hold one."""

    @property
    @abstractmethod
    def masked(self) -> bool:
        """Whether some tokens are padding or out of use, and have next to no size."""

    @property
    @abstractmethod
    def keys(self) -> fx.Node:
        """``[B, H, N, D]``, as the block's attention multiplies them."""

    @property
    @abstractmethod
    def queries(self) -> fx.Node:
        """``[B, H, N, D]``, as the block's attention multiplies them."""

    @property
    @abstractmethod
    def values(self) -> fx.Node:
        """``[B, H, N, D]``, as the block's attention weighs them."""

    @property
    @abstractmethod
    def class_attention(self) -> fx.Node:
        """``[B, N]``: what the first protected token pays each token, the mean over heads.

        Where no token is protected: what all pay, the mean over them.
        """

    @abstractmethod
    def attention_to(self, queries: list[int]) -> fx.Node:
        """``[B, N]``: what the tokens at some positions pay each token, or all that are in use if
        none is named; the mean over them and over heads, summing to 1.
        """

    @property
    def left(self) -> int:
        """N', the tokens left after the block."""
        return self.tokens - self.r

    @property
    def width(self) -> int:
        """C of the residual stream."""
        return int(self.hidden.meta["val"].shape[-1])

    @property
    def masked_size(self) -> fx.Node | None:
        """The sizes where some tokens are padding or out of use; None where none is."""
        return self.size if self.masked else None

    # ---- operators ---------------------------------------------------------------------------

    @abstractmethod
    def call(self, name: str | Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``tome::`` operator by name, or any other functional operator."""

    @abstractmethod
    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor of the method's own, on the device of the stream."""

    def item(self, results: fx.Node, index: int) -> fx.Node:
        """One of several results of an operator."""
        return self.call(operator.getitem, results, index)

    def slice(self, x: fx.Node, start: int, end: int, step: int = 1) -> fx.Node:
        """``x[:, start:end:step]``."""
        return self.call(aten.slice.Tensor, x, 1, start, end, step)

    def side_by_side(self, x: fx.Node) -> fx.Node:
        """All heads of ``[B, H, N, D]`` in one, or ``[B, N, C]`` as one head: ``[B, 1, N, C]``."""
        if x.meta["val"].ndim == 4:
            turned = self.call(aten.transpose.int, x, 1, 2)
            x = self.call(aten.flatten.using_ints, turned, 2, 3)
        return self.call(aten.unsqueeze.default, x, 1)

    # ---- answers -----------------------------------------------------------------------------

    def matched(
        self, name: str | Any, *args: Any, combine: str | MLERP = "weighted_mean"
    ) -> Reduction:
        """Merges by an operator that answers where each token goes, or that and what stands."""
        found = self.call(name, *args)
        if isinstance(found.meta["val"], torch.Tensor):
            return Reduction(found, found, combine=combine)
        return Reduction(self.item(found, 0), found, self.item(found, 1), combine)

    def without_sources(self, matched: Reduction) -> Reduction:
        """What a match would merge away, dropped: the tokens that stand keep their values."""
        stands = matched.stands
        assert stands is not None
        return replace(
            matched,
            combine="keep",
            size=self.call("gather_size", self.size, stands),
            holds=self.call("places", stands, self.tokens),
        )

    def pruned(self, stands: fx.Node, size: fx.Node | None = None) -> Reduction:
        """Keeps the tokens at ``stands``, ``[B, N']`` positions, and drops the rest.

        For the way back to all tokens the most similar token kept, by its keys, stands in for
        each one dropped.

        Args:
            size: ``[B, N']`` float32 afterwards, 0 at places out of use, which hold none; None:
                that of the tokens kept.
        """
        if size is None:
            size = self.call("gather_size", self.size, stands)
        masked = size if self.masked else None
        where = (stands, self.tokens) if masked is None else (stands, self.tokens, masked)
        return Reduction(
            assign=self.call("nearest", self.keys, stands, self.protected, masked),
            chosen=stands,
            stands=stands,
            combine="keep",
            size=size,
            holds=self.call("places", *where),
        )
