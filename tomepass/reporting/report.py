"""What ``explain`` answers: what was found, what is done, what was refused and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from torch import fx

from tomepass.errors import Refused, TomeError
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.origin import source_line
from tomepass.methods import Method
from tomepass.model.calls import describe_inputs
from tomepass.ops.library import is_overhead
from tomepass.planning.macs import batch_of, batch_sizes, graph_macs, macs_by_name, node_macs
from tomepass.planning.streams import Planned, PlannedStream
from tomepass.printing.style import Printed, facts, gmacs, ranges, table, versions
from tomepass.reading.layouts import Attended, Averaged, Contracted, Taken
from tomepass.reading.mismatch import Mismatch
from tomepass.rewriting.rewritten import Rewritten

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from tomepass.reading.mismatch import Mismatch


@dataclass(frozen=True)
class BlockReport:
    """One block: tokens in and out, the nodes matched, MACs per image before and after."""

    index: int
    tokens_in: int
    tokens_out: int
    r: int
    macs_original: int
    macs: int
    entry: str
    attention: str
    weights: str
    join: str
    merge_at: str
    source: str | None


@dataclass(frozen=True)
class StreamReport:
    """One residual stream.

    Args:
        tokens: entering it.
        protected: positions that never merge.
        blocks: in order.
        readout: how its tokens are read out: taken, pooled, returned.
        sides: what lies beside the tokens, a row each, and is carried along.
    """

    tokens: int
    protected: tuple[int, ...]
    blocks: tuple[BlockReport, ...]
    readout: tuple[str, ...]
    sides: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Report(Printed):
    """What the pass found in a model and does to it. Prints as a table.

    Args:
        model: the model's class, as a label.
        inputs: the tensors it was read with.
        method: what was asked for.
        streams: the streams that are merged.
        refused: each stream or attention left alone, with the reason.
        unmerged: readers before which tokens are unmerged, with the reason.
        macs_original: multiply-accumulates per image as captured, of what the outputs are made
            from; a product with a size that only data decide counts nothing.
        macs: the same after merging, without the pass's own operators.
        macs_overhead: matching and merging.
        paths: how proportional attention is computed on the device it was read with.
        kernels: on CUDA, which operators run as Triton kernels, and why others do not.
        notes: what else holds of the capture: for which batch size, that it was not compared.
    """

    model: str
    inputs: str
    method: Method
    streams: tuple[StreamReport, ...]
    refused: tuple[Mismatch, ...]
    unmerged: tuple[Mismatch, ...]
    macs_original: int
    macs: int
    macs_overhead: int
    paths: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of_nothing(cls, model: str, inputs: str, method: Method, error: TomeError) -> Report:
        """Of what no graph could be made of, and why."""
        return cls(model, inputs, method, (), (_mismatch(error),), (), 0, 0, 0)

    @property
    def ok(self) -> bool:
        """Is at least one stream merged?"""
        return bool(self.streams)

    @property
    def blocks(self) -> tuple[BlockReport, ...]:
        """The blocks of all streams, in order."""
        return tuple(block for stream in self.streams for block in stream.blocks)

    @property
    def protected(self) -> tuple[int, ...]:
        """Protected positions of the first stream."""
        return self.streams[0].protected if self.streams else ()

    @property
    def speedup_ideal(self) -> float:
        """MACs before over MACs after: what the arithmetic allows."""
        return self.macs_original / self.macs if self.macs else 1.0

    def refusal(self) -> Refused:
        """The first reason for refusing, as an error."""
        first = self.refused[0] if self.refused else Mismatch("nothing to merge was found")
        return Refused(
            f"{self.model} cannot be merged: {first.reason}",
            block=first.block,
            node=first.node,
            source=first.source,
            advice=first.advice,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {
            "method": self.method.to_dict(),
            "speedup_ideal": self.speedup_ideal,
            "ok": self.ok,
        }

    def _line(self) -> str:
        if not self.streams:
            return f"{self.model}: {self.method!r}, left unmerged"
        ends = ((s.tokens, s.blocks[-1].tokens_out) for s in self.streams)
        tokens = " and ".join(f"{first} -> {last}" for first, last in ends)
        return f"{self.model}: {self.method!r}, {tokens} tokens, ideal {self.speedup_ideal:.2f}x"

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:

        yield from report_tables(self)


def _mismatch(error: TomeError) -> Mismatch:
    return Mismatch(error.reason, error.block, error.node, error.source, error.advice)


def make_report(
    model: str,
    captured: CanonicalGraph,
    planned: Planned,
    rewritten: Rewritten | None,
    refused: TomeError | None,
) -> Report:
    """Gathers a report; ``rewritten`` is None where the model is left alone."""
    mismatches = list(planned.mismatches)
    if refused is not None:
        mismatches.insert(0, _mismatch(refused))
    batch = batch_of(captured)
    before = macs_by_name(captured)
    original = merged = sum(before.values())
    overhead = 0
    streams: tuple[StreamReport, ...] = ()
    unmerged: tuple[Mismatch, ...] = ()
    if rewritten is not None:
        nodes = list(rewritten.module.graph.nodes)
        after = graph_macs(rewritten.module.graph, batch)
        merged = sum(after[n.name] for n in nodes if not is_overhead(n))
        overhead = sum(node_macs(n) // batch for n in nodes if is_overhead(n))
        streams = tuple(_stream(s, captured, rewritten, before, after) for s in planned.streams)
        unmerged = rewritten.unmerged
    return Report(
        model,
        _readable(_inputs(captured), captured),
        planned.method,
        streams,
        tuple(replace(m, reason=_readable(m.reason, captured)) for m in mismatches),
        tuple(replace(m, reason=_readable(m.reason, captured)) for m in unmerged),
        original,
        merged,
        overhead,
    )


def _data(captured: CanonicalGraph) -> list[fx.Node]:
    return [n for n in captured.graph.find_nodes(op="placeholder") if n.name in captured.data]


def _inputs(captured: CanonicalGraph) -> str:
    nodes = _data(captured)
    # torch.export and Dynamo both prefix an input's name, each in its own way.
    names = [n.name.removeprefix("call_").removeprefix("l_").removesuffix("_") for n in nodes]
    return describe_inputs(dict(zip(names, (n.meta["val"] for n in nodes), strict=True)))


def _readable(text: str, captured: CanonicalGraph) -> str:
    """The symbol of the batch, if it has one, as B."""
    for batch in batch_sizes(captured):
        if not isinstance(batch, int) and str(batch).isidentifier():
            return re.sub(rf"\b{batch}\b", "B", text)
    return text


def _stream(
    planned: PlannedStream,
    captured: CanonicalGraph,
    rewritten: Rewritten,
    before: dict[str, int],
    after: dict[str, int],
) -> StreamReport:
    members = _members(planned, captured.graph)
    blocks = []
    for block, plan, names in zip(planned.stream.blocks, planned.plan.blocks, members, strict=True):
        blocks.append(
            BlockReport(
                index=block.index,
                tokens_in=plan.tokens_in,
                tokens_out=plan.tokens_out,
                r=plan.r,
                macs_original=sum(before[n] for n in names),
                macs=sum(after[rewritten.renamed[n]] for n in names if n in rewritten.renamed),
                entry=block.entry.name,
                attention=block.attention.result.name,
                weights=block.attention.weights.name,
                join=block.join.name,
                merge_at=block.merge_at.name,
                source=source_line(block.attention.result),
            )
        )
    readout = _readout(planned, rewritten)
    sides = _sides(planned)
    return StreamReport(planned.plan.tokens, planned.plan.protected, tuple(blocks), readout, sides)


_HOW = {
    "mean": "added by position: the mean of the rows of the merged tokens",
    "kept": "multiplied by position (rotary): the row of the token merged into; tokens alike but "
    "for their places merge approximately",
    "bias": "position bias of the attention: log-mean-exp over merged keys, which is exact, "
    "and the mean over merged queries, which is not",
}


def _sides(planned: PlannedStream) -> tuple[str, ...]:
    """The tables and masks that the tokens meet inside the stream."""
    found: dict[str, set[str]] = {}
    for side in planned.sides:
        found.setdefault(side.how, set()).add(side.node.name)
    lines = [f"{_names(found[how])}: {text}" for how, text in _HOW.items() if how in found]
    if planned.padding is not None:
        lines.append(f"{planned.padding.name}: padding, which merges with padding alone")
    return tuple(lines)


def _names(names: set[str]) -> str:
    first = min(names, key=lambda name: (len(name), name))
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _members(planned: PlannedStream, graph: fx.Graph) -> list[list[str]]:
    """Names of the nodes that work on tokens, block by block."""
    starts = {block.entry: block.index for block in planned.stream.blocks}
    members: list[list[str]] = [[] for _ in planned.stream.blocks]
    current = None
    for node in graph.nodes:
        current = starts.get(node, current)
        if current is not None and node in planned.flow.outcomes and node_macs(node):
            members[current].append(node.name)
    return members


def _readout(planned: PlannedStream, rewritten: Rewritten) -> tuple[str, ...]:
    lines = []
    for node, outcome in planned.flow.outcomes.items():
        # What nobody reads, and what the blocks themselves take, is no readout.
        if node.name not in rewritten.renamed or node in planned.inner:
            continue
        if isinstance(outcome, Averaged):
            lines.append(f"{node.name}: mean over tokens, weighted by size")
        elif isinstance(outcome, Contracted) or (
            isinstance(outcome, Attended) and outcome.layout is None
        ):
            lines.append(f"{node.name}: attention pooling, keys weighted by size")
        elif isinstance(outcome, Taken) and outcome.layout is None:
            lines.append(f"{node.name}: reads tokens {list(outcome.positions)}")
    layouts = {node.name for node in planned.flow.layouts}
    lines += [f"{name}: {how}" for name, how in rewritten.returned.items() if name in layouts]
    return tuple(lines)


def report_tables(report: Report) -> Iterator[RenderableType]:
    """The printed form of ``explain``."""
    title = f"{report.model}: {report.method!r}"
    if not report.streams:
        yield Text(f"{title}: left unmerged", style="bold")
    for number, stream in enumerate(report.streams):
        suffix = f", stream {number}" if len(report.streams) > 1 else ""
        yield _stream_table(stream, title + suffix)
        yield facts(
            ("protected", [_positions(stream.protected)]),
            ("beside", list(stream.sides)),
            ("read by", list(stream.readout)),
        )
    yield facts(
        ("unmerged", [_reason(m) for m in report.unmerged]),
        ("refused", [_reason(m, blocks) for m, blocks in _alike(report.refused)]),
        ("MACs", _costs(report)),
        ("paths", list(report.paths)),
        ("kernels", list(report.kernels)),
        ("notes", list(report.notes)),
        ("inputs", [report.inputs]),
        ("versions", [versions()]),
    )


def _stream_table(stream: StreamReport, title: str) -> Table:
    made = table(title, "block", "tokens", "r", "MACs", "of original", "attention at")
    made.columns[-1].justify = "left"
    for b in stream.blocks:
        share = b.macs / b.macs_original if b.macs_original else 1.0
        made.add_row(
            str(b.index),
            f"{b.tokens_in} -> {b.tokens_out}",
            str(b.r),
            gmacs(b.macs),
            f"{share:.0%}",
            (b.source or b.attention).split(": ")[0].split("/")[-1],
        )
    return made


def _reason(mismatch: Mismatch, blocks: Sequence[int] = ()) -> str:
    file, _, code = (mismatch.source or "").partition(": ")
    where = [f"block{'s' if len(blocks) > 1 else ''} {ranges(blocks)}"] if blocks else []
    where += [f"node {mismatch.node}"] if mismatch.node else []
    where += [file] if file else []
    details = [", ".join(where), code, f"what to do: {mismatch.advice}" if mismatch.advice else ""]
    return "\n".join([mismatch.reason, *(f"- {detail}" for detail in details if detail)])


def _alike(mismatches: Sequence[Mismatch]) -> list[tuple[Mismatch, list[int]]]:
    """Mismatches with the same reason at the same place told once, with all their blocks."""
    found: dict[object, tuple[Mismatch, list[int]]] = {}
    for mismatch in mismatches:
        key = (mismatch.reason, mismatch.source, mismatch.advice)
        _, blocks = found.setdefault(key, (mismatch, []))
        blocks += [mismatch.block] if mismatch.block is not None else []
    return list(found.values())


def _costs(report: Report) -> list[str]:
    unmerged = f"{gmacs(report.macs_original)} an image unmerged"
    if not report.streams:
        return [unmerged]
    return [
        f"{unmerged}, {gmacs(report.macs)} merged: ideal speed-up {report.speedup_ideal:.2f}x",
        f"{gmacs(report.macs_overhead)} more for matching and merging",
    ]


def _positions(positions: Sequence[int]) -> str:
    if not positions:
        return "no token"
    return f"token{'s' if len(positions) > 1 else ''} {ranges(positions)}"
