"""A GPU borrowed for a quarter of an hour: what is worth most first, until time is up.

    python -m benchmarks gpu --quarter --out FOLDER

Every part is a command of its own (``python -m benchmarks gpu --only ...``) in a process of its
own: an illegal access or a hang in one leaves the others as they are. Each writes its files row by
row and what it prints beside them, and ``gpu_quarter.json`` and ``gpu_quarter.md`` are written anew
after each part, so that whatever breaks the run off leaves what was found. A part is started only
if what it is expected to take fits what is left of the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.gpu.publishing import Asked, device_name, shown, versions
from benchmarks.results import Results
from tomepass.measuring.environment import environment

Row = Mapping[str, Any]

_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")
"""How the last line of a traceback begins; libraries print on after it, as Triton does."""


@dataclass(frozen=True)
class Part:
    """One command, and what it is expected to take with empty caches on a Hopper GPU.

    Args:
        asked: the command.
        minutes: expected. Guesses until a device has been measured, on the long side.
        most: after so many it is stopped, for it hangs.
    """

    asked: Asked
    minutes: float
    most: float


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Args:
        state: ``done``, ``failed``, ``stopped`` (out of time; rows may be there) or ``skipped``.
        seconds: that it took.
        why: the error of a part that failed, the reason for another that is not done.
        rows: what it wrote.
    """

    state: str
    seconds: float = 0.0
    why: str = ""
    rows: Sequence[Row] = ()

    @property
    def wrong(self) -> bool:
        """It failed, or a row says that something is not right."""
        return self.state == "failed" or any(row.get("right") == "NO" for row in self.rows)


def planned_parts(like: Asked) -> tuple[Part, ...]:
    """What a quarter of an hour is spent on, in this order: 13.5 minutes if all goes as expected.

    Args:
        like: dtype, rounds and size of all parts.
    """

    def part(only: str, expected: float, most: float, **told: Any) -> Part:
        asked = replace(like, only=only, **{"mode": "default", "r": None, **told})
        return Part(asked, expected, most)

    of_vit_b: dict[str, Any] = {"r": None if like.tiny else 16}
    return (
        part("correctness", 3.0, 4.0, minutes=3.0),
        part("vit_b", 2.5, 5.0, **of_vit_b),
        part("vit_b", 1.5, 4.0, mode="reduce-overhead", **of_vit_b),
        part("profile", 2.5, 5.0),
        part("bandwidth", 0.7, 2.0),
        part("batch1", 1.3, 3.0, mode="reduce-overhead"),
        part("attention", 2.0, 4.0),
    )


def quarter_of_an_hour(like: Asked, out: Path) -> int:
    """Runs all parts that fit, and writes a summary; 1 if one failed or is not right, else 0."""
    parts = planned_parts(like)
    outcomes: list[Outcome] = []

    def keep(part: Part, outcome: Outcome) -> None:
        outcomes.append(outcome)
        said = f"{outcome.state} in {outcome.seconds:.0f} s"
        typer.echo(f"{part.asked.file}: {said}{': ' * bool(outcome.why)}{outcome.why}")
        results = summary(like, parts, outcomes)
        if len(outcomes) == len(parts):
            results.publish(out)
        else:
            results.write(out)

    out.mkdir(parents=True, exist_ok=True)
    # Where this process is ended by a signal, the part that runs is ended too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        spend(parts, like.minutes, lambda part, seconds: run_part(part, seconds, out), keep)
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(any(outcome.wrong for outcome in outcomes))


def spend(
    parts: Sequence[Part],
    minutes: float,
    run: Callable[[Part, float], Outcome],
    keep: Callable[[Part, Outcome], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs parts in order, and skips each that would not fit the time that is left.

    Args:
        parts: in their order.
        minutes: for all.
        run: runs one, given the seconds after which it must be over. What it raises is kept as
            the part's failure, and the next part is run.
        keep: takes what became of each part, as soon as it is known.
        clock: seconds.
    """
    end = clock() + 60 * minutes
    for part in parts:
        start = clock()
        left = end - start
        if 60 * part.minutes > left:
            why = f"expected to take {part.minutes:g} min, {max(left, 0.0) / 60:.1f} min are left"
            keep(part, Outcome("skipped", why=why))
            continue
        try:
            outcome = run(part, min(left, 60 * part.most))
        except Exception as error:
            outcome = Outcome("failed", why=f"{type(error).__name__}: {error}")
        keep(part, replace(outcome, seconds=clock() - start))


def run_part(part: Part, seconds: float, out: Path) -> Outcome:
    """One part in a process of its own, stopped with all it has started when time is up."""
    file, log = (out / f"{part.asked.file}{suffix}" for suffix in (".json", ".log"))
    file.unlink(missing_ok=True)  # of an earlier run: it would pass for this one's
    words = [sys.executable, "-m", "benchmarks", "gpu", *part.asked.arguments, "--out", str(out)]
    with log.open("w") as said:
        process = subprocess.Popen(
            words,
            env=_surroundings(part.asked.tiny),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Inductor's compiling processes are stopped with it
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome("stopped", why=f"after {seconds / 60:.1f} min", rows=rows_of(file))
        finally:
            _stop(process)
    if process.returncode:
        return Outcome("failed", why=_last_words(log.read_text()), rows=rows_of(file))
    return Outcome("done", rows=rows_of(file))


def _surroundings(tiny: bool) -> dict[str, str]:
    interpreted = tiny and not torch.cuda.is_available()
    return {**os.environ, **({"TRITON_INTERPRET": "1"} if interpreted else {})}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its own; nothing happens where all have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(said: str) -> str:
    """The last error among what a process printed, else how it ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    told = errors[-1] if errors else " / ".join(lines[-3:])
    return told[:600].replace("|", "/") or "it said nothing"


def rows_of(file: Path) -> Sequence[Row]:
    """What a part has written; nothing where it came to nothing."""
    if not file.exists():
        return ()
    found: list[Row] = json.loads(file.read_text())["rows"]
    return found


def summary(like: Asked, parts: Sequence[Part], outcomes: Sequence[Outcome]) -> Results:
    """What became of all parts so far, as a table; the JSON holds their rows too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = f"python -m benchmarks gpu --quarter --minutes {like.minutes:g} --dtype {like.dtype}"
    command += f" --rounds {like.rounds}{' --tiny' * like.tiny}"
    where = {
        "command": command,
        **versions(device),
        "transformers": environment()["transformers"],
    }
    rows = [
        {
            "part": part.asked.file.removeprefix("gpu_"),
            "state": outcome.state,
            "seconds": outcome.seconds,
            "expected, s": 60 * part.minutes,
            "found": outcome.why or told(part.asked.only, outcome.rows),
            "rows": list(outcome.rows),
        }
        for part, outcome in zip(parts, outcomes, strict=False)
    ]
    return Results(
        name=f"gpu_quarter{'_tiny' * like.tiny}",
        title=f"A quarter of an hour, {device_name(device)}",
        columns={
            name: shown(name) for name in ("part", "state", "seconds", "expected, s", "found")
        },
        rows=rows,
        settings={"minutes": like.minutes, "dtype": like.dtype, "rounds": like.rounds, **where},
        plot=None,
        note="; ".join(f"{key}: {value}" for key, value in where.items()),
    )


def told(only: str, rows: Sequence[Row]) -> str:
    """The figures of a part that are looked at first, in a line."""
    if not rows:
        return "no rows"
    if only == "correctness":
        counted = [row["right"] for row in rows]
        wrong = "; ".join(f"WRONG: {row['case']}" for row in rows if row["right"] == "NO")
        said = f"{counted.count('yes')} of {len(rows)} cases right"
        left = counted.count("not run")
        return said + (f", {left} not run" if left else "") + (f"; {wrong}" if wrong else "")
    if only == "profile":
        merged = rows[-1]
        return f"matching and merging {merged['matching and merging']:.1%} of {merged['what']} time"
    if only == "bandwidth":
        return "; ".join(f"{row['shape']}: {row['merge, of copy']:.2f} of a copy" for row in rows)
    if only == "attention":
        return "; ".join(f"{row['tokens']} tokens: {row['fastest']}" for row in rows)
    return "; ".join(
        f"r={row['r']}: {row['speed-up']:.2f}x ({row['least']:.2f}-{row['greatest']:.2f}), "
        f"{row['of ideal']:.2f} of ideal"
        for row in rows
    )
