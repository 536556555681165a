"""What tomepass adds to a model: all of it stands under one name, ``merged.tome``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.capture.captured import read_state
from tomepass.counts.blocks import BlockPlan, StreamPlan
from tomepass.errors import Refused, TomeError
from tomepass.handover.applied import Applied
from tomepass.handover.choices import OnUnmatched, Outputs
from tomepass.methods import Method
from tomepass.model.batches import first_of
from tomepass.model.calls import as_call
from tomepass.reporting.kept import KeptReport
from tomepass.reporting.report import Report

if TYPE_CHECKING:
    from tomepass.handover.standing_in.wrapping import StandIn

M = TypeVar("M", bound="StandIn", covariant=True)


class Added(Generic[M]):
    """What tomepass adds to a merged model, as ``merged.tome``; whatever else one asks a merged
    model for is the model's own.

    Inputs are given as the model takes them (``source``, ``kept``, ``routes``), or as one value:
    a tensor, a tuple of positional inputs, or a dict of keyword inputs.
    """

    def __init__(self, merged: M) -> None:
        self._merged = merged

    # ---- how it was made ---------------------------------------------------------------------

    @property
    def method(self) -> Method:
        """What is done."""
        return self._merged._tome.method

    @property
    def original(self) -> nn.Module:
        """The model, whose parameters are shared."""
        return self._merged._tome.model

    @property
    def outputs(self) -> Outputs:
        """``"original"``, or ``"merged"`` where token sequences come back short."""
        return self._merged._tome.outputs  # type: ignore[no-any-return]

    @property
    def on_unmatched(self) -> OnUnmatched:
        """What is done where the model cannot be merged."""
        return self._merged._tome.on_unmatched  # type: ignore[no-any-return]

    # ---- what was captured -------------------------------------------------------------------

    @property
    def plan(self) -> tuple[StreamPlan, ...]:
        """How many tokens each block of each stream has and loses, in the capture used last.

        Raises:
            TomeError: if nothing has been captured yet.
        """
        return tuple(
            StreamPlan(
                stream.tokens,
                stream.protected,
                tuple(BlockPlan(b.index, b.tokens_in, b.r) for b in stream.blocks),
            )
            for stream in self.report().streams
        )

    def report(self, inputs: Any = None) -> Report:
        """What was read off the graph, and done: for inputs like these, or in the capture used
        last.

        Raises:
            TomeError: if nothing has been captured yet, and no inputs are given.
        """
        captures = self._merged._tome.captures
        if inputs is not None:
            return told_of_limit(self.captured(inputs), captures.limit)
        if (latest := captures.latest()) is None:
            raise TomeError(
                "nothing has been captured yet, so there is nothing to tell of",
                advice="call the merged model first, or give inputs like those it will take",
            )
        return told_of_limit(latest, captures.limit)

    def captured(self, inputs: Any) -> Applied:
        """The rewritten graph for inputs like these, made if it is not there yet."""
        return captured(self._merged, inputs)

    def bind(self, inputs: Any) -> dict[str, Any]:
        """Inputs of the model as its keyword inputs."""
        return self._merged._tome.call_of(inputs)

    def prepare(self, inputs: Any) -> M:
        """Captures and rewrites ahead of the first call with inputs like these.

        Returns:
            the merged model.
        """
        self._merged._tome_prepare(inputs)
        return self._merged

    def clear(self) -> None:
        """Forgets all that was captured; what is needed is captured again."""
        self._merged._tome.captures.clear()

    # ---- where the tokens went ---------------------------------------------------------------

    def source(self, *args: Any, **kwargs: Any) -> Tensor:
        """The final token of every original token: ``[B, N]`` indices into the merged sequence.

        Takes the model's inputs; needs ``trace_source=True`` in the method.

        Raises:
            TomeError: if it is not traced, or the model is left unmerged.
        """
        tome = self._merged._tome
        if not tome.method.trace_source:
            raise TomeError(
                "the source map is not traced",
                advice=f"apply with {tome.method.replace(trace_source=True)!r}",
            )
        call = tome.bind(args, kwargs)
        applied = tome.captures.get(tome.model, call)
        if applied.graph is None:
            raise Refused("this model is left unmerged, so there is no source map")
        leaves = pytree.tree_leaves(call)
        if applied.source_graph is not None:
            (source,) = applied.run(tome.model, leaves, graph=applied.source_graph)
            return source  # type: ignore[no-any-return]
        first, stream = first_of(call), applied.report.streams[0]
        assert first is not None
        assert not any(block.r for block in stream.blocks), "merges without a source map"
        # Nothing merges: every token is its own.
        return torch.arange(stream.tokens, device=first.device).expand(first.shape[0], -1)

    def kept(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens in use after each block of the first stream, for each image: ``[B, blocks]``.

        Takes the model's inputs. Padding and places out of use do not count.

        Raises:
            TomeError: if the model is left unmerged.
        """
        tome = self._merged._tome
        call = tome.bind(args, kwargs)
        applied = tome.captures.get(tome.model, call)
        if applied.graph is None:
            raise Refused("this model is left unmerged, so no block loses a token")
        state = read_state(tome.model, applied.capture)
        return applied.counting.counts(state, pytree.tree_leaves(call))

    def kept_report(self, inputs: Any) -> KeptReport:
        """The distribution of :meth:`kept` over the images of inputs like those it takes."""
        args, kwargs = as_call(inputs)
        kept = self.kept(*args, **kwargs)
        (stream, *_) = self.captured(inputs).report.streams
        return KeptReport.of(type(self.original).__name__, self.method, stream, kept)

    # ---- budgets -----------------------------------------------------------------------------

    @property
    def budgets(self) -> tuple[Any, ...]:
        """The models that images go to, from the least redundant images to the most: itself,
        unless the method is adaptive.
        """
        return (self._merged,)

    def routes(self, *args: Any, **kwargs: Any) -> Tensor:
        """The budget of each image, ``[B]`` int64. Takes the model's inputs."""
        first = first_of(self._merged._tome.bind(args, kwargs))
        assert first is not None
        return torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)

    def __repr__(self) -> str:
        made = len(self._merged._tome.captures)
        model = type(self.original).__name__
        return f"<tome of {model}: {self.method!r}, {made} capture{'' if made == 1 else 's'}>"


def captured(merged: StandIn, inputs: Any) -> Applied:
    """The rewritten graph of a merged model for inputs like these, made if it is not there."""
    tome = merged._tome
    return tome.captures.get(tome.model, tome.call_of(inputs))


def told_of_limit(applied: Applied, captures: int) -> Report:
    """A report that says how many captures are kept, where each batch size needs one."""
    report = applied.report
    if applied.capture.form.size is None:
        return report
    told = f"{captures} captures are kept: captures= of tomepass.apply"
    return replace(report, notes=(*report.notes, told))
