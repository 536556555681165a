"""How many tokens are in use for each image, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from torch import Tensor, fx

from tomepass.capture.captured import Capture
from tomepass.graphs.surgery import only_outputs
from tomepass.methods import Method
from tomepass.model.batches import first_of
from tomepass.ops.padding import PADDED
from tomepass.planning.plan_graph import plan_graph
from tomepass.printing.style import Printed, table
from tomepass.rewriting.sweep import rewrite

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from tomepass.reporting.report import StreamReport


@dataclass(frozen=True)
class KeptBlock:
    """Over some images, the tokens in use after a block.

    Args:
        index: of the block.
        places: the static number of tokens there is room for, which is what they cost.
        least: of all images.
        lower: the first quartile.
        median: the second.
        upper: the third.
        most: of all images.
        mean: over all images.
    """

    index: int
    places: int
    least: int
    lower: float
    median: float
    upper: float
    most: int
    mean: float


@dataclass(frozen=True, repr=False)
class KeptReport(Printed):
    """How many tokens of their first stream some images keep; prints as a table."""

    model: str
    method: Method
    images: int
    tokens: int
    blocks: tuple[KeptBlock, ...]

    @classmethod
    def of(cls, model: str, method: Method, stream: StreamReport, kept: Tensor) -> KeptReport:
        """The report of tokens in use, ``[B, blocks]``, of a stream."""
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=kept.device)
        blocks = []
        for block, column in zip(stream.blocks, kept.unbind(1), strict=True):
            least, most = int(column.min()), int(column.max())
            lower, median, upper = column.double().quantile(quartiles).tolist()
            mean = float(column.double().mean())
            figures = (least, lower, median, upper, most, mean)
            blocks.append(KeptBlock(block.index, block.tokens_out, *figures))
        return cls(model, method, kept.shape[0], stream.tokens, tuple(blocks))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"method": self.method.to_dict()}

    def _line(self) -> str:
        last = f", {self.blocks[-1].mean:.1f} in use at the end" if self.blocks else ""
        return f"{self.model}: {self.method!r}, {self.images} images of {self.tokens} tokens{last}"

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:

        yield kept_table(self)


@dataclass(frozen=True)
class Counting:
    """A graph that answers the sizes of tokens, and which of them tell of which block.

    Args:
        graph: the rewritten graph with sizes alone as its results; None if nothing is reduced.
        columns: for each block of the first stream the index of its result, None before anything
            is reduced.
        tokens: of the first stream.
    """

    graph: fx.GraphModule | None
    columns: tuple[int | None, ...]
    tokens: int

    @classmethod
    def of(cls, capture: Capture, method: Method) -> Counting:
        """The counting graph of a model that was captured and can be rewritten."""
        planned = plan_graph(capture.graph, method)
        rewritten = rewrite(capture.graph, planned, sizes=True)
        names = [name for name in dict.fromkeys(rewritten.sizes) if name is not None]
        columns = tuple(None if name is None else names.index(name) for name in rewritten.sizes)
        graph = only_outputs(rewritten.module, names) if names else None
        return cls(graph, columns, planned.streams[0].plan.tokens)

    def counts(self, state: Sequence[Tensor], leaves: Sequence[Any]) -> Tensor:
        """Tokens in use after each block, ``[B, blocks]`` int64.

        Args:
            state: the model's, as the capture needs it.
            leaves: the inputs; the first dimension of the first tensor is the batch.
        """
        sizes = () if self.graph is None else self.graph(*state, *leaves)
        used = [(size >= PADDED).sum(-1) for size in sizes]
        first = first_of(leaves)
        assert first is not None
        full = torch.full((first.shape[0],), self.tokens, device=first.device)
        return torch.stack([full if c is None else used[c] for c in self.columns], dim=1)


def kept_table(report: KeptReport) -> Table:
    """The printed form of ``kept_report``."""
    title = f"{report.model}: {report.method!r}"
    columns = ("places", "min", "25 %", "50 %", "75 %", "max", "mean")
    caption = f"tokens in use, of {report.tokens}, over {report.images} images"
    made = table(title, "block", *columns, caption=caption)
    for b in report.blocks:
        quartiles = (f"{figure:g}" for figure in (b.lower, b.median, b.upper))
        made.add_row(
            *(str(b.index), str(b.places), str(b.least), *quartiles, str(b.most)), f"{b.mean:.1f}"
        )
    return made
