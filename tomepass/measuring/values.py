"""What a measurement is: settings, arms, medians with their spread; as JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tomepass.methods import Method, ToMe, method_from_dict

Environment = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one figure, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the two in the middle."""
        return self.quantile(0.5)

    @property
    def low(self) -> float:
        """The smallest sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The largest sample."""
        return max(self.samples)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the samples lie, interpolated linearly."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        return below + (place - math.floor(place)) * (above - below)

    def to_dict(self) -> dict[str, Any]:
        """Median, minimum, maximum, quartiles and the samples themselves."""
        return {
            "median": self.median,
            "min": self.low,
            "max": self.high,
            "q1": self.quantile(0.25),
            "q3": self.quantile(0.75),
            "samples": list(self.samples),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Spread:
        """What :meth:`to_dict` wrote."""
        return Spread(tuple(data["samples"]))


@dataclass(frozen=True)
class Settings:
    """What was measured, and how.

    Args:
        model: a label.
        method: what the merged form merges.
        dtype: of the weights, for example ``"bfloat16"``.
        batch: images a call.
        inner: the backend that compiled both.
        inner_options: its options, sorted by name.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of PyTorch, within one operator.
        rounds: samples of each form.
        calls: calls a sample.
        cold: were both compiled with empty compiler caches?
    """

    model: str
    method: Method
    dtype: str
    batch: int
    inner: str
    inner_options: tuple[tuple[str, Any], ...]
    device: str
    threads: int
    rounds: int
    calls: int
    cold: bool

    @property
    def method_label(self) -> str:
        """``8``, ``(13, -1.0)``: the schedule alone where that says all, else the whole method."""
        schedule = self.method.schedule
        if self.method != ToMe(schedule):
            return repr(self.method)
        return repr(schedule).removeprefix("r=")

    @property
    def options_label(self) -> str:
        """``freezing``, ``no freezing``, ``max_autotune, epilogue_fusion=…``; empty for none."""
        words = []
        for name, value in self.inner_options:
            if isinstance(value, bool):
                words.append(name if value else f"no {name}")
            else:
                words.append(f"{name}={value}")
        return ", ".join(words)

    @property
    def title(self) -> str:
        """What measurements in one plot share: ``vit_base, bfloat16, batch 16, inductor``."""
        return f"{self.model}, {self.dtype}, batch {self.batch}, {self.inner}"

    @property
    def where(self) -> str:
        """``cpu, 2 threads`` or ``cuda``."""
        return f"cpu, {threads_named(self.threads)}" if self.device == "cpu" else self.device

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {
            "method": self.method.to_dict(),
            "inner_options": dict(self.inner_options),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Settings:
        """What :meth:`to_dict` wrote."""
        return Settings(
            **{
                **data,
                "method": method_from_dict(data["method"]),
                "inner_options": tuple(sorted(data["inner_options"].items())),
            }
        )


@dataclass(frozen=True)
class Arm:
    """One form of the model, original or merged, compiled.

    Args:
        milliseconds: an image.
        peak_bytes: the most tensor memory a call holds beyond weights and inputs.
        compile_seconds: the first call, which compiles.
    """

    milliseconds: Spread
    peak_bytes: int
    compile_seconds: float

    @property
    def images_per_second(self) -> float:
        """At the median time."""
        return 1000.0 / self.milliseconds.median

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "milliseconds": self.milliseconds.to_dict(),
            "images_per_second": self.images_per_second,
            "peak_bytes": self.peak_bytes,
            "compile_seconds": self.compile_seconds,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Arm:
        """What :meth:`to_dict` wrote."""
        return Arm(
            Spread.from_dict(data["milliseconds"]), data["peak_bytes"], data["compile_seconds"]
        )


@dataclass(frozen=True)
class Measurement:
    """The original and the merged form of a model, side by side.

    Args:
        settings: what was measured, and how.
        original: the model, compiled.
        merged: its merged form, compiled by the same backend.
        ratio: original time over merged time, round by round; above 1 merging is faster.
        ratio_ideal: the same by multiply-accumulates alone, from the report.
        apply_seconds: capturing and rewriting, before any compilation.
    """

    settings: Settings
    original: Arm
    merged: Arm
    ratio: Spread
    ratio_ideal: float
    apply_seconds: float

    @property
    def memory_ratio(self) -> float:
        """Original peak over merged peak; above 1 merging needs less."""
        return self.original.peak_bytes / max(self.merged.peak_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with the derived figures."""
        return {
            "settings": self.settings.to_dict(),
            "original": self.original.to_dict(),
            "merged": self.merged.to_dict(),
            "ratio": self.ratio.to_dict(),
            "ratio_ideal": self.ratio_ideal,
            "memory_ratio": self.memory_ratio,
            "apply_seconds": self.apply_seconds,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measurement:
        """What :meth:`to_dict` wrote."""
        return Measurement(
            settings=Settings.from_dict(data["settings"]),
            original=Arm.from_dict(data["original"]),
            merged=Arm.from_dict(data["merged"]),
            ratio=Spread.from_dict(data["ratio"]),
            ratio_ideal=data["ratio_ideal"],
            apply_seconds=data["apply_seconds"],
        )


def to_json(measurements: Sequence[Measurement], environment: Environment) -> str:
    """One JSON object: ``environment`` and ``measurements``, the samples included."""
    data = {
        "environment": environment,
        "measurements": [measurement.to_dict() for measurement in measurements],
    }
    return json.dumps(data, indent=1)


def from_json(text: str) -> tuple[list[Measurement], Environment]:
    """What :func:`to_json` wrote."""
    data = json.loads(text)
    return [Measurement.from_dict(m) for m in data["measurements"]], data["environment"]


def threads_named(count: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} thread{'s' * (count != 1)}"
