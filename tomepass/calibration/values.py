"""What calibration and planning return: candidates, scores, a plan and what was tried for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.text import Text

from tomepass.errors import TomeError
from tomepass.methods import Method, ToMe, method_from_dict
from tomepass.printing.style import Printed, facts, table, versions

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


@dataclass(frozen=True)
class Candidate:
    """One method that was tried.

    Args:
        method: with its counts.
        macs: the share of the multiply-accumulates it leaves.
        divergence: on the images it was tuned on.
    """

    method: Method
    macs: float
    divergence: float


@dataclass(frozen=True, repr=False)
class Calibration(Printed):
    """What :func:`calibrate` measured.

    Args:
        macs: the share of the multiply-accumulates that the chosen method leaves.
        tuned: the chosen method, on the images it was chosen by.
        held_out: the same on images that had no say.
        even: ``ToMe`` with even counts at the same MACs, on the images held out.
        linearity: of each block, 0 linear (ToFu, arXiv 2312.01026).
        sensitivity: the divergence when that block alone loses ``alone`` tokens.
        alone: tokens.
        tried: every candidate, in order.
        seed: of the choice of images held out.
    """

    macs: float
    tuned: Score
    held_out: Score
    even: Score
    linearity: tuple[float, ...]
    sensitivity: tuple[float, ...]
    alone: int
    tried: tuple[Candidate, ...]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        tried = [asdict(t) | {"method": t.method.to_dict()} for t in self.tried]
        return asdict(self) | {"tried": tried}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_dict` wrote."""
        scores = {name: Score(**data[name]) for name in ("tuned", "held_out", "even")}
        lists = {name: tuple(data[name]) for name in ("linearity", "sensitivity")}
        tried = [Candidate(**{**t, "method": method_from_dict(t["method"])}) for t in data["tried"]]
        return Calibration(**{**data, **scores, **lists, "tried": tuple(tried)})

    def _line(self) -> str:
        held = self.held_out
        return (
            f"{len(self.tried)} candidates at {self.macs:.1%} of the MACs, divergence "
            f"{held.divergence:.4f} on {held.images} images held out"
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield from calibration_tables(self)

    def plot(self, path: str | Path) -> None:
        """Draws linearity and sensitivity, a bar a block, into a PNG."""
        from tomepass.printing.plots import profile_plot

        profile_plot(self.linearity, self.sensitivity, self.alone, path)


@dataclass(frozen=True)
class Score:
    """How close a reduced model is to the model, over some images.

    Args:
        divergence: mean KL(unmerged || reduced) in nats where the model returns logits, else the
            mean squared distance over the mean square of the unmerged output.
        agreement: the share of images with the same highest logit; None without logits.
        top1: the share of images classified right; None without labels.
        images: how many.
    """

    divergence: float
    agreement: float | None
    top1: float | None
    images: int


@dataclass(frozen=True)
class Tried:
    """One schedule that was measured.

    Args:
        method: with counts a block, as they were merged.
        macs: the share of the unmerged multiply-accumulates that is left.
        speedup: unmerged time over merged time, the median of the rounds.
        least: of the rounds.
        greatest: of the rounds.
    """

    method: Method
    macs: float
    speedup: float
    least: float
    greatest: float


@dataclass(frozen=True, repr=False)
class Plan(Printed):
    """What :func:`plan` found: ``tomepass.apply(model, plan.method)`` carries it out.

    Args:
        method: the fastest of what was tried; ``ToMe(r=0)`` where merging does not pay.
        speedup: as measured; 1 where nothing is merged; None where it was not.
        why: in words.
        tried: all that was measured, in order.
        inner: the backend that compiled both forms.
        environment: versions, processor, threads.
        calibration: what :func:`tomepass.calibrate` measured.
    """

    method: Method
    speedup: float | None
    why: str
    tried: tuple[Tried, ...]
    inner: str
    environment: tuple[tuple[str, Any], ...]
    calibration: Calibration | None = None

    @property
    def merges(self) -> bool:
        """Does merging pay here?"""
        return self.method != ToMe(0)

    def to_json(self) -> str:
        """One JSON object; :meth:`from_json` reads it back."""
        data = asdict(self) | {"environment": dict(self.environment)}
        data["method"] = self.method.to_dict()
        data["calibration"] = self.calibration and self.calibration.to_dict()
        data["tried"] = [asdict(t) | {"method": t.method.to_dict()} for t in self.tried]
        return json.dumps(data, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            TomeError: if it is not a plan.
        """
        try:
            data = json.loads(text)
            tried = [Tried(**{**t, "method": method_from_dict(t["method"])}) for t in data["tried"]]
            method = method_from_dict(data["method"])
            where = tuple(sorted(data["environment"].items()))
            known = {"method": method, "tried": tuple(tried), "environment": where}
            if data.get("calibration") is not None:
                known["calibration"] = Calibration.from_dict(data["calibration"])
            return Plan(**{**data, **known})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TomeError(
                f"this is no plan: {error}", advice="Plan.save() writes what Plan.load() reads"
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the plan to a JSON file."""
        Path(path).write_text(self.to_json() + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan in a JSON file.

        Raises:
            TomeError: if it is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TomeError(
                f"{Path(path).name!r} is no plan: it is not UTF-8: {error}",
                advice="Plan.save() writes what Plan.load() reads",
            ) from error
        return Plan.from_json(text)

    def replace(self, **changes: Any) -> Plan:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def _line(self) -> str:
        speed = "" if self.speedup is None else f", {self.speedup:.2f}x measured"
        return f"{self.method!r}{speed}"

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:

        yield from plan_tables(self)


def plan_tables(plan: Plan) -> Iterator[RenderableType]:
    """The printed form of a plan."""
    yield Text(f"{plan.method!r}: {plan.why}")
    for t in plan.tried:
        spread = f"{t.speedup:.2f}x ({t.least:.2f}-{t.greatest:.2f})"
        yield Text(f"  {spread} with {t.macs:.0%} of the MACs: {t.method!r}")
    if (found := plan.calibration) is None:
        return
    yield from calibration_tables(found, plan.method.counts(len(found.linearity)))


def calibration_tables(
    found: Calibration, counts: Sequence[int] | None = None
) -> Iterator[RenderableType]:
    """The printed form of a calibration.

    Args:
        counts: tokens that each block loses by the plan it led to.
    """
    alone = f"divergence if {found.alone} go here alone"
    made = table("", "block", *([] if counts is None else ["r"]), "not linear", alone)
    for index, (bent, lost) in enumerate(zip(found.linearity, found.sensitivity, strict=True)):
        r = [] if counts is None else [str(counts[index])]
        made.add_row(str(index), *r, f"{bent:.3f}", f"{lost:.4f}")
    yield made
    made = table("", "images", "divergence", "same top-1", "even ToMe's divergence")
    for name, score, even in (
        (f"{found.tuned.images} tuned on", found.tuned, ""),
        (f"{found.held_out.images} held out", found.held_out, f"{found.even.divergence:.4f}"),
    ):
        agreed = "" if score.agreement is None else f"{score.agreement:.1%}"
        made.add_row(name, f"{score.divergence:.4f}", agreed, even)
    yield made
    yield facts(
        ("MACs", [f"{found.macs:.1%} of the unmerged ones"]),
        ("tried", [f"{len(found.tried)} candidates, seed {found.seed}"]),
        ("versions", [versions()]),
    )
