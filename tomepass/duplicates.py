"""Lossless on duplicates: where tokens are identical, merging them must change nothing.

The size-weighted mean and proportional attention are exact there, whatever the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.capture import Capture
from tomepass.graphs import relative_error, with_outputs, zeroed
from tomepass.methods import Method
from tomepass.module import read_state
from tomepass.origins import position_terms
from tomepass.planning import Planned, plan_graph
from tomepass.rewrite import Rewritten, rewrite
from tomepass.schedule import Schedule, parse_schedule

# Heights of the constant regions, as shares: unequal, so that sizes matter.
REGIONS = (0.4, 0.3, 0.2, 0.1)
TOLERANCE = 1e-4


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
    """Merged against unmerged on an input of a few constant regions, position terms zeroed.

    Position biases of the attention are position terms too.

    ``r`` is halved until only duplicates merge: a schedule that must merge different tokens
    loses information by design.
    """
    if method.lossy:
        return DuplicatesResult(0.0, 0.0, method.schedule, method.lossy)
    if not method.prop_attn:
        return DuplicatesResult(0.0, 0.0, method.schedule, "proportional attention is off")
    planned = plan_graph(capture.graph, method)
    if any(side.how == "kept" for stream in planned.streams for side in stream.sides):
        reason = "tokens are multiplied by position (rotary), so that no two are alike"
        return DuplicatesResult(0.0, 0.0, method.schedule, reason)
    # Bands along one dimension can put all duplicates at positions of one parity.
    positions = _position_names(capture, planned)
    result = _along(model, capture, method, call, positions, -2)
    return result if result.blind is None else _along(model, capture, method, call, positions, -1)


def _along(
    model: nn.Module,
    capture: Capture,
    method: Method,
    call: dict[str, Any],
    positions: set[str],
    dim: int,
) -> DuplicatesResult:
    inputs = pytree.tree_map(lambda value: constant_regions(value, dim), call)
    values = [*read_state(model, capture), *pytree.tree_leaves(inputs)]
    original = zeroed(capture.graph.module, positions)(*values)
    schedule = _as_counts(capture, method)
    while any(schedule.values[:1] if schedule.kind == "linear" else schedule.values):
        attempt = method.replace(r=schedule, trace_source=False)
        rewritten = rewrite(capture.graph, plan_graph(capture.graph, attempt), sizes=True)
        merged, alike = _run(rewritten, positions, values)
        if alike:
            control = _control(capture, attempt, positions, values)
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


def _run(rewritten: Rewritten, positions: set[str], values: list[Any]) -> tuple[Any, bool]:
    """The outputs, and whether every token merged with its like alone, however they combine."""
    renamed = {rewritten.renamed[p] for p in positions if p in rewritten.renamed}
    names = list(dict.fromkeys(n for x, assign, _ in rewritten.joined for n in (x, assign)))
    outputs, held = zeroed(with_outputs(rewritten.module, names), renamed)(*values)
    found = dict(zip(names, held, strict=True))
    joined = ((found[x], found[assign], tokens) for x, assign, tokens in rewritten.joined)
    return outputs, all(_alike(x, assign, tokens) for x, assign, tokens in joined)


def _alike(x: Tensor, assign: Tensor, tokens: int) -> bool:
    index = assign.unsqueeze(-1).expand_as(x)
    empty = x.new_zeros(x.shape[0], tokens, x.shape[2])
    highest = empty.scatter_reduce(1, index, x, "amax", include_self=False)
    lowest = empty.scatter_reduce(1, index, x, "amin", include_self=False)
    return relative_error(lowest, highest) <= TOLERANCE / 10


def _control(capture: Capture, method: Method, positions: set[str], values: list[Any]) -> Any:
    planned = plan_graph(capture.graph, method.replace(prop_attn=False))
    return _run(rewrite(capture.graph, planned), positions, values)[0]


def _position_names(capture: Capture, planned: Planned) -> set[str]:
    names = {
        term.name
        for s in planned.streams
        for term in position_terms(s.stream.entry, s.layout.tokens.dim, capture.graph.data)
    }
    for stream in planned.streams:
        names |= {side.node.name for side in stream.sides if side.how in ("mean", "bias")}
    return names


def _worst(ours: Any, theirs: Any) -> float:
    pairs = zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True)
    return max(
        (relative_error(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()),
        default=0.0,
    )
