"""Lossless on duplicates: where tokens are identical, merging them must change nothing.

The size-weighted mean and proportional attention are exact there, whatever the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.capture.captured import Capture, read_state
from tomepass.counts.schedule import Schedule, parse_schedule
from tomepass.graphs.nodes import shape_of
from tomepass.graphs.surgery import with_outputs, without_places
from tomepass.methods import Method
from tomepass.planning.plan_graph import plan_graph
from tomepass.planning.streams import Planned
from tomepass.proof.replay import relative_error
from tomepass.reading.layouts import Carried
from tomepass.reading.origins import position_terms
from tomepass.rewriting.rewritten import Rewritten
from tomepass.rewriting.sweep import rewrite

# Heights of the constant regions, as shares: unequal, so that sizes matter.
REGIONS = (0.4, 0.3, 0.2, 0.1)


TOLERANCE = 1e-4

Places = dict[str, int | None]
"""Names of nodes that tell places apart, as :func:`without_places` takes them."""


@dataclass(frozen=True)
class DuplicatesResult:
    """What merging duplicates changed.

    Args:
        error: against the unmerged model.
        control: the same without proportional attention, which must be large.
        schedule: what was merged in the end.
        blind: why the figures prove nothing, if they do not.
    """

    error: float
    control: float
    schedule: Schedule
    blind: str | None


def check_duplicates(
    model: nn.Module, capture: Capture, method: Method, call: dict[str, Any]
) -> DuplicatesResult:
    """Merged against unmerged on an input of a few constant regions, told apart by no position.

    Position embeddings and position biases of the attention are zeroed; of a table that multiplies
    the tokens (rotary) all have the first one's row.

    ``r`` is halved until only duplicates merge: a schedule that must merge different tokens
    loses information by design.
    """
    if method.lossy:
        return DuplicatesResult(0.0, 0.0, method.schedule, method.lossy)
    if not method.prop_attn:
        return DuplicatesResult(0.0, 0.0, method.schedule, "proportional attention is off")
    places = _places(capture, plan_graph(capture.graph, method))
    # Bands along one dimension can put all duplicates at positions of one parity.
    result = _along(model, capture, method, call, places, -2)
    return result if result.blind is None else _along(model, capture, method, call, places, -1)


def _along(
    model: nn.Module,
    capture: Capture,
    method: Method,
    call: dict[str, Any],
    places: Places,
    dim: int,
) -> DuplicatesResult:
    inputs = pytree.tree_map(lambda value: constant_regions(value, dim), call)
    values = [*read_state(model, capture), *pytree.tree_leaves(inputs)]
    original = without_places(capture.graph.module, places)(*values)
    schedule = _as_counts(capture, method)
    while any(schedule.values[:1] if schedule.kind == "linear" else schedule.values):
        attempt = method.replace(r=schedule, trace_source=False)
        rewritten = rewrite(capture.graph, plan_graph(capture.graph, attempt), sizes=True)
        merged, alike = _run(rewritten, places, values)
        if alike:
            control = _control(capture, attempt, places, values)
            error, without = _worst(merged, original), _worst(control, original)
            blind = None
            if without <= TOLERANCE:
                blind = f"without proportional attention the error is {without:.0e} too"
            return DuplicatesResult(error, without, schedule, blind)
        schedule = _halved(schedule)
    reason = "no schedule down to r=1 merges only identical tokens of a constant input"
    return DuplicatesResult(0.0, 0.0, schedule, reason)


def _as_counts(capture: Capture, method: Method) -> Schedule:
    """The schedule in counts, which can be halved."""
    if method.schedule.kind in ("constant", "list", "linear"):
        return method.schedule
    streams = plan_graph(capture.graph, method).streams
    deepest = max(streams, key=lambda stream: len(stream.plan.blocks))
    return parse_schedule([block.r for block in deepest.plan.blocks])


def _halved(schedule: Schedule) -> Schedule:
    if schedule.kind == "linear":
        count, inflection = schedule.values
        return parse_schedule((int(count) // 2, inflection))
    counts = [int(count) // 2 for count in schedule.values]
    return parse_schedule(counts if schedule.kind == "list" else counts[0])


def constant_regions(value: Any, dim: int = -2) -> Any:
    """An input of the same shape with constant bands along one of its last two dimensions."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():  # ids, and masks of them
        return _constant_ids(value) if value.ndim == 2 else value
    if value.ndim < 3:
        return value
    generator = torch.Generator().manual_seed(0)
    bands, start = [], 0
    for end in _ends(value.shape[dim]):
        level = torch.randn(*value.shape[:-2], 1, 1, generator=generator).to(value)
        band = value.narrow(dim, start, end - start)
        bands.append(2 * level.expand_as(band))
        start = end
    return torch.cat(bands, dim=dim)


def _constant_ids(value: Tensor) -> Tensor:
    bands, start = [], 0
    for end in _ends(value.shape[1]):
        # Ids the model knows: those that stood where a band starts.
        bands.append(value[:, start : start + 1].expand(-1, end - start))
        start = end
    return torch.cat(bands, dim=1)


def _ends(size: int) -> list[int]:
    return [round(size * sum(REGIONS[: i + 1])) for i in range(len(REGIONS))]


def _run(rewritten: Rewritten, places: Places, values: list[Any]) -> tuple[Any, bool]:
    """The outputs, and whether every token merged with its like alone, however they combine."""
    renamed = {new: places[old] for old, new in rewritten.renamed.items() if old in places}
    names = list(dict.fromkeys(n for x, assign, _ in rewritten.joined for n in (x, assign)))
    outputs, held = without_places(with_outputs(rewritten.module, names), renamed)(*values)
    found = dict(zip(names, held, strict=True))
    joined = ((found[x], found[assign], tokens) for x, assign, tokens in rewritten.joined)
    return outputs, all(_alike(x, assign, tokens) for x, assign, tokens in joined)


def _alike(x: Tensor, assign: Tensor, tokens: int) -> bool:
    index = assign.unsqueeze(-1).expand_as(x)
    empty = x.new_zeros(x.shape[0], tokens, x.shape[2])
    highest = empty.scatter_reduce(1, index, x, "amax", include_self=False)
    lowest = empty.scatter_reduce(1, index, x, "amin", include_self=False)
    return relative_error(lowest, highest) <= TOLERANCE / 10


def _control(capture: Capture, method: Method, places: Places, values: list[Any]) -> Any:
    planned = plan_graph(capture.graph, method.replace(prop_attn=False))
    return _run(rewrite(capture.graph, planned), places, values)[0]


def _places(capture: Capture, planned: Planned) -> Places:
    """All that tells one place from another."""
    places: Places = {}
    for stream in planned.streams:
        entry, dim = stream.stream.entry, stream.layout.tokens.dim
        terms = position_terms(entry, dim, capture.graph.data)
        places |= dict.fromkeys((term.name for term in terms), None)
        places |= {s.node.name: None for s in stream.sides if s.how in ("mean", "bias")}
        for node, outcome in stream.flow.outcomes.items():
            if isinstance(outcome, Carried):
                rows = outcome.layout.tokens.dim - len(shape_of(node))
                places |= {s.node.name: rows for s in outcome.sides if s.how == "kept"}
    return places


def _worst(ours: Any, theirs: Any) -> float:
    pairs = zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True)
    return max(
        (relative_error(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()),
        default=0.0,
    )
