"""The job behind ``tomepass export``: write a file, run it, and only then put it in its place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.doors import Door, door
from tomepass.errors import TomeError
from tomepass.examples import example_inputs
from tomepass.exporting import export, export_unmerged
from tomepass.methods import Method
from tomepass.module import MergedModel, apply
from tomepass.turns import medians_in_turns

if TYPE_CHECKING:
    from rich.table import Table

    from tomepass.doors import Run

TOLERANCE = 1e-3
"""The greatest relative error at which a float32 file counts as the model's."""
BATCHES = (1, 2, 7)
_ROUNDS = 5


@dataclass(frozen=True)
class Parity:
    """A written file against the applied model, on one batch.

    Args:
        batch: images.
        max_error: the greatest absolute difference of any output.
        relative_error: the greatest, over outputs, of the norm of the difference over the norm.
        same_top1: the share of images with the same greatest entry of the first output; None
            where it is not one row an image.
    """

    batch: int
    max_error: float
    relative_error: float
    same_top1: float | None


@dataclass(frozen=True)
class Artifact:
    """A file that was written, and what its runtime says.

    Args:
        path: the file.
        door: its format.
        parity: a row a batch size.
        milliseconds: of a call, unmerged and merged, both from files of the same format.
        timed_batch: images a call.
    """

    path: Path
    door: Door
    parity: tuple[Parity, ...]
    milliseconds: tuple[float, float] | None
    timed_batch: int

    @property
    def speedup(self) -> float | None:
        """Unmerged time over merged time."""
        return None if self.milliseconds is None else self.milliseconds[0] / self.milliseconds[1]

    def table(self) -> Table:
        """A row a batch size, and the speed below."""
        from tomepass.tables import table

        caption = "speed not measured"
        if self.milliseconds is not None:
            before, after = self.milliseconds
            caption = (
                f"{self.door.runtime}, batch {self.timed_batch}: {before:.1f} ms unmerged, "
                f"{after:.1f} ms merged, {before / after:.2f}x"
            )
        columns = ("batch", "max error", "relative error", "same top-1")
        shown = table(f"{self.path.name} against apply", *columns, caption=caption)
        for row in self.parity:
            top = "-" if row.same_top1 is None else f"{100 * row.same_top1:.0f} %"
            shown.add_row(str(row.batch), f"{row.max_error:.1e}", f"{row.relative_error:.1e}", top)
        return shown


def write_artifact(
    model: nn.Module,
    method: Method,
    to: str,
    path: Path,
    *,
    force: bool = False,
    dynamic_batch: bool = True,
    batch: int = 8,
    timed: bool = True,
    options: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], None] = lambda step: None,
) -> Artifact:
    """Exports a model, writes it in a format, and runs what was written.

    The file is made in a folder aside and moved to its place when it has passed: an error leaves
    nothing behind.

    Args:
        model: a transformers model in eval mode.
        method: what to merge.
        to: the format, one of :data:`tomepass.doors.DOORS`.
        path: of the file; formats of two files put the second beside it.
        force: replace what is there.
        dynamic_batch: any batch size; False fixes it at ``batch``.
        batch: images a timed call.
        timed: measure against the unmerged model, written in the same format.
        options: of the format's ``load``, for both models.
        tolerance: the greatest relative error allowed where the model is float32.
        progress: told what is being done.

    Raises:
        TomeError: if the path will not do, the runtime is not installed, the model is refused or
            does not convert, or what was written computes something else.
    """
    form = door(to)
    check_path(path, form, force)
    form.check()
    inputs, options = example_inputs(model, batch), options or {}
    progress("merging and exporting")
    program = export(model, method, example_inputs=inputs, dynamic_batch=dynamic_batch)
    merged = apply(model, method, example_inputs=inputs)
    with _aside(path) as folder:
        target = folder / path.name
        progress(f"writing {to}")
        form.write(program, target)
        progress("running what was written")
        run = form.load(target, **options)
        sizes = BATCHES if dynamic_batch else (batch,)
        rows = tuple(parity(run, merged, example_inputs(model, size)) for size in sizes)
        _check_parity(rows, path, model, tolerance)
        milliseconds = None
        if timed:
            progress("writing the unmerged model to measure against")
            plain = export_unmerged(model, example_inputs=inputs, dynamic_batch=dynamic_batch)
            other = folder / "unmerged"
            other.mkdir()
            form.write(plain, other / path.name)
            progress("measuring")
            unmerged = form.load(other / path.name, **options)
            before, after = medians_in_turns(
                [lambda: unmerged(inputs), lambda: run(inputs)], _ROUNDS, calls=1
            )
            milliseconds = (before, after)
            shutil.rmtree(other)
        _put_in_place(folder, path, force)
    return Artifact(path, form, rows, milliseconds, batch)


def check_path(path: Path, form: Door, force: bool) -> None:
    """Raises a TomeError where a file of a format cannot or must not be written at a path."""
    if path.suffix != form.suffix:
        raise TomeError(
            f"{form.runtime} reads files that end with {form.suffix}, got {path.name!r}",
            advice=f"-o {path.with_suffix(form.suffix).name}",
        )
    if path.is_dir():
        raise TomeError(f"{str(path)!r} is a directory; expected the name of a file")
    if not path.parent.is_dir():
        raise TomeError(f"no such directory: {str(path.parent)!r}", advice="make it first")
    for there in (path, path.with_suffix(".bin"), path.with_name(path.name + ".data")):
        companion = there == path or form.name in ("openvino", "onnx")
        if companion and there.exists() and not force:
            raise TomeError(f"{there.name!r} exists", advice="give --force to replace it")


def parity(run: Run, merged: MergedModel, inputs: Mapping[str, Any]) -> Parity:
    """What was written against the applied model, on the same inputs."""
    with torch.no_grad():
        theirs = [v for v in pytree.tree_leaves(merged(**inputs)) if isinstance(v, Tensor)]
    ours = run(inputs)
    if [tuple(v.shape) for v in ours] != [tuple(v.shape) for v in theirs]:
        raise TomeError(
            f"expected outputs {[list(v.shape) for v in theirs]}, "
            f"the file gives {[list(v.shape) for v in ours]}"
        )
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    first = pairs[0]
    rows = first[0].ndim == 2 and first[0].shape[1] > 1
    return Parity(
        batch=len(theirs[0]),
        max_error=max(_greatest(a - b) for a, b in pairs),
        relative_error=max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs),
        same_top1=float((first[0].argmax(1) == first[1].argmax(1)).double().mean())
        if rows
        else None,
    )


def _check_parity(rows: tuple[Parity, ...], path: Path, model: nn.Module, tolerance: float) -> None:
    worst = max(rows, key=lambda row: row.relative_error)
    single = next(model.parameters()).dtype is torch.float32
    # Not "greater than": what is not a number fails too.
    if single and not worst.relative_error <= tolerance:
        raise TomeError(
            f"what was written computes something else: a relative error of "
            f"{worst.relative_error:.1e} at batch {worst.batch}, {tolerance:.0e} is allowed; "
            f"{path.name!r} was not written",
            advice="try another format or version of its runtime, and report it",
        )


def _greatest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A folder on the same file system, so that moving a file out of it is one step."""
    folder = Path(tempfile.mkdtemp(prefix=".tomepass-", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, path: Path, force: bool) -> None:
    """Moves the files of a format, what they refer to first."""
    if path.exists() and not force:  # made by somebody else meanwhile
        raise TomeError(f"{path.name!r} exists", advice="give --force to replace it")
    for made in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
        made.replace(path.parent / made.name)
