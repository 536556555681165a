"""The job behind ``tomepass export``: write a file, run it, and only then put it in its place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.errors import NotExported, TomeError
from tomepass.formats import Door, door
from tomepass.formats.exporting import export, export_unmerged
from tomepass.formats.names import reason
from tomepass.handover.applying import apply
from tomepass.handover.choices import Outputs
from tomepass.handover.merged import MergedModel
from tomepass.measuring.turns import medians_in_turns
from tomepass.methods import Method
from tomepass.sources.examples import example_inputs

if TYPE_CHECKING:
    from rich.table import Table

    from tomepass.formats import Run


TOLERANCE = 1e-3
"""The greatest relative error at which a float32 file counts as the model's."""


LOW_PRECISION_TOLERANCE = 0.5
"""In bfloat16 and float16, where other tokens may merge: beyond it a file has gone wrong."""


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
        from tomepass.printing.style import table

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


@dataclass(frozen=True)
class Writing:
    """How a model is written, run and judged.

    Args:
        dynamic_batch: any batch size; False fixes it at ``batch``.
        batch: images a timed call.
        timed: measure against the unmerged model, written in the same format.
        options: of the format's ``load``, for both models.
        tolerance: the greatest relative error allowed. Default: :data:`TOLERANCE`, or
            :data:`LOW_PRECISION_TOLERANCE` for a model in bfloat16 or float16.
        outputs: as in :func:`tomepass.apply`.
    """

    dynamic_batch: bool = True
    batch: int = 8
    timed: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    outputs: Outputs = "original"

    def check(self, form: Door) -> None:
        """Refuses a batch that the format's runtime does not take."""
        if self.dynamic_batch and form.most is not None and self.batch > form.most:
            raise NotExported(
                f"{form.runtime} is written for batches of 1 to {form.most}, got {self.batch}",
                advice="a smaller batch, or a fixed one: dynamic_batch=False, --dynamic none",
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes on which the file is held against the model."""
        return BATCHES if self.dynamic_batch else (self.batch,)


AS_USUAL = Writing()


def write_artifact(
    model: nn.Module,
    method: Method,
    to: str,
    path: Path,
    how: Writing = AS_USUAL,
    *,
    force: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Artifact:
    """Exports a model, writes it in a format, and runs what was written.

    The file is made in a folder aside and moved to its place when it has passed: an error leaves
    nothing behind.

    Args:
        model: a transformers model in eval mode.
        method: what to merge.
        to: the format, one of :data:`tomepass.formats.DOORS`.
        path: of the file; formats of two files put the second beside it.
        how: batches, tolerance, and whether it is timed.
        force: replace what is there.
        progress: told what is being done.

    Raises:
        TomeError: if the path will not do, the runtime is not installed, the model is refused,
            the runtime fails, or what was written computes something else.
        OSError: if the folder cannot be written to.
    """
    form = door(to)
    check_path(path, form, force)
    how.check(form)
    form.check()
    inputs = example_inputs(model, how.batch)
    progress("merging and exporting")
    program = export(
        model,
        method,
        outputs=how.outputs,
        example_inputs=inputs,
        dynamic_batch=how.dynamic_batch,
    )
    merged = apply(model, method, example_inputs=inputs, outputs=how.outputs)
    with _aside(path) as folder:
        progress(f"writing {to}")
        run = _written(form, program, folder / path.name, how.options)
        progress("running what was written")
        rows = tuple(parity(run, merged, example_inputs(model, size)) for size in how.sizes)
        _check_parity(rows, path, _tolerance(model) if how.tolerance is None else how.tolerance)
        milliseconds = None
        if how.timed:
            progress("writing the unmerged model to measure against")
            beside = folder / "unmerged"
            beside.mkdir()
            unmerged = _unmerged(form, model, inputs, beside / path.name, how)
            progress("measuring")
            functions = [lambda: unmerged(inputs), lambda: run(inputs)]
            before, after = medians_in_turns(functions, _ROUNDS, calls=1)
            milliseconds = (before, after)
        _put_in_place(folder, form, path, force)
    return Artifact(path, form, rows, milliseconds, how.batch)


def _unmerged(
    form: Door, model: nn.Module, inputs: Mapping[str, Any], path: Path, how: Writing
) -> Run:
    """What runs the unmerged model, written in the same format."""
    program = export_unmerged(model, example_inputs=inputs, dynamic_batch=how.dynamic_batch)
    return _written(form, program, path, how.options)


def check_path(path: Path, form: Door, force: bool) -> None:
    """Raises a TomeError where a file of a format cannot or must not be written at a path."""
    if path.suffix != form.suffix:
        raise NotExported(
            f"{form.runtime} reads files that end with {form.suffix}, got {path.name!r}",
            advice=f"-o {path.with_suffix(form.suffix).name}",
        )
    if path.is_dir():
        raise NotExported(f"{str(path)!r} is a directory; expected the name of a file")
    if not path.parent.is_dir():
        raise NotExported(f"no such directory: {str(path.parent)!r}", advice="make it first")
    _refuse_existing(path, form, force)


def parity(run: Run, merged: MergedModel, inputs: Mapping[str, Any]) -> Parity:
    """What was written against the applied model, on the same inputs."""
    with torch.no_grad():
        theirs = [v for v in pytree.tree_leaves(merged(**inputs)) if isinstance(v, Tensor)]
    ours = run(inputs)
    if [tuple(v.shape) for v in ours] != [tuple(v.shape) for v in theirs]:
        raise NotExported(
            f"expected outputs {[list(v.shape) for v in theirs]}, "
            f"the file gives {[list(v.shape) for v in ours]}"
        )
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(ours, theirs, strict=True)]
    first = pairs[0]
    rows = first[0].ndim == 2 and first[0].shape[1] > 1
    return Parity(
        batch=len(theirs[0]),
        max_error=_greatest((a - b).abs() for a, b in pairs),
        relative_error=_greatest((a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs),
        same_top1=float((first[0].argmax(1) == first[1].argmax(1)).double().mean())
        if rows
        else None,
    )


def _check_parity(rows: tuple[Parity, ...], path: Path, tolerance: float) -> None:
    # Not "greater than": what is not a number fails too.
    wrong = [row for row in rows if not row.relative_error <= tolerance]
    if wrong:
        raise NotExported(
            f"what was written computes something else: a relative error of "
            f"{wrong[0].relative_error:.1e} at batch {wrong[0].batch}, {tolerance:.0e} is allowed; "
            f"{path.name!r} was not written",
            advice="try another format or version of its runtime, and report it",
        )


def _tolerance(model: nn.Module) -> float:
    low = any(value.dtype in (torch.bfloat16, torch.float16) for value in model.parameters())
    return LOW_PRECISION_TOLERANCE if low else TOLERANCE


def _written(form: Door, program: Any, path: Path, options: Mapping[str, Any]) -> Run:
    """What runs a program that is written first."""
    with _told(form):
        form.write(program, path)
        run = form.load(path, **options)

    def told(call: Mapping[str, Any]) -> list[Tensor]:
        with _told(form):
            return run(call)

    return told


@contextmanager
def _told(form: Door) -> Iterator[None]:
    """What a runtime raises, in classes of its own, as an error that names it."""
    try:
        yield
    except TomeError:
        raise
    except Exception as error:
        advice = "try dynamic_batch=False, another format, or another version of its runtime"
        raise NotExported(
            f"{form.runtime} failed: {reason(error)}",
            advice=None if isinstance(error, OSError) else advice,
        ) from error


def _greatest(values: Iterable[Tensor]) -> float:
    """Of all entries; not a number where one is none, which Python's ``max`` may step over."""
    return float(torch.cat([torch.zeros(1), *(value.flatten() for value in values)]).max())


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A folder on the same file system, so that moving a file out of it is one step."""
    folder = Path(tempfile.mkdtemp(prefix=".tomepass-", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(path: Path, form: Door, force: bool) -> None:
    for there in form.files(path):
        if there.exists() and not force:
            raise NotExported(f"{there.name!r} exists", advice="give --force to replace it")


def _put_in_place(folder: Path, form: Door, path: Path, force: bool) -> None:
    """Moves the files of a format, what they refer to first; one that was not made goes away."""
    _refuse_existing(path, form, force)  # made by somebody else meanwhile
    files = form.files(path)
    made = [file for file in files if (folder / file.name).exists()]
    for file in reversed(made):
        (folder / file.name).replace(file)
    for file in set(files) - set(made):
        file.unlink(missing_ok=True)
