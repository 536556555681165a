"""Writes docs/support-matrix.md from the table that the tests go through.

python tests/support_matrix.py docs/support-matrix.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from zoo import COUNTS, FAMILIES, REFUSED, Family, Refused

_HEAD = f"""\
# What merges

*Written by `python tests/support_matrix.py docs/support-matrix.md` from the table that the tests
go through, family by family, in both doors (`tomepass.apply` and the backend). Tiny models of
transformers 5 with random weights, three or four blocks. No line of the pass knows any of their
names.*

Tokens: those that enter, and those left after each block, for `r={COUNTS}`. Each merged family is
the original to the bit at r=0, and lossless on duplicate tokens unless it has rotary positions;
those are compared with a plain reference.

| family | input | tokens | protected | carried beside the tokens | read out | result |
|---|---|---|---|---|---|---|
"""
_TAIL = """\

What stays unmerged says why in `tomepass.explain(model)`; what to do about it stands under
[When a model is refused](when-refused.md).
"""


def page() -> str:
    """The whole page."""
    rows = [_merged(family) for family in FAMILIES.values()]
    rows += [_left_alone(refused) for refused in REFUSED.values()]
    return _HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows) + _TAIL


def _merged(family: Family) -> list[str]:
    streams = family.streams
    return [
        family.title,
        family.kind,
        "; ".join(" → ".join(map(str, (s.tokens, *s.after))) for s in streams),
        "; ".join(_positions(s.protected) for s in streams),
        ", ".join(family.sides) or "—",
        "; ".join(_read_out(family)),
        _result(family),
    ]


def _left_alone(refused: Refused) -> list[str]:
    reason = refused.reason.replace("may be causal", "causal attention")
    return [refused.title, refused.kind, "—", "—", "—", "—", f"refused: {reason}"]


def _positions(positions: tuple[int, ...]) -> str:
    """``0``, ``0 to 4``, ``0, 65 to 69`` or ``none``."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ", ".join(spans) or "none"


def _read_out(family: Family) -> list[str]:
    found = [_reader(line) for stream in family.streams for line in stream.readout]
    if family.unmerged:
        found.append("by position, unmerged first")
    return list(dict.fromkeys(found))


def _reader(line: str) -> str:
    if line.startswith("mean"):
        return "mean, weighted by size"
    if line.startswith("attention"):
        return "attention pooling, weighted by size"
    if line.startswith("returned"):
        return "returned unmerged"
    positions = tuple(int(p) for p in line.split("[")[1].rstrip("]").split(","))
    return f"token{'s' if len(positions) > 1 else ''} {_positions(positions)}"


def _result(family: Family) -> str:
    if not family.refused:
        return "merged"
    towers = {"causal": "its causal tower", "ids": "its text tower"}
    rest = next((t for word, t in towers.items() if word in family.refused[0]), "its decoder")
    return f"merged; {rest} left alone"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
