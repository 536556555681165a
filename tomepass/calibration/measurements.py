"""The file that calibration keeps its measurements in: read, checked and written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree

from tomepass.calibration.judging import Judge, Outputs
from tomepass.calibration.linearity import block_linearity
from tomepass.errors import TomeError, first_lines
from tomepass.measuring.environment import environment
from tomepass.methods import Method
from tomepass.sources.files import write_whole

if TYPE_CHECKING:
    from tomepass.handover.compiling.inner import Inner


_PROFILED = 32  # images that the linearity is measured on


class Memory:
    """What was measured, in memory and, if asked for, in a file."""

    def __init__(self, judge: Judge, path: Path | None) -> None:
        self.judge, self.path = judge, path
        digest = hashlib.sha256(judge.unmerged.double().numpy(force=True).tobytes())
        self.key = digest.hexdigest()
        self.known: dict[str, Any] = {}
        if path is not None:
            stored = read_measurements(path, self.key, judge.images, judge.depth)
            if stored is None:
                self._write()  # what cannot be kept is better said before the work
            else:
                self.known = stored

    def outputs(self, method: Method) -> Outputs:
        """A method on all images."""
        name = method.to_json()
        if name not in self.known:
            found = self.judge.outputs(method)
            same = None if found.same is None else found.same.tolist()
            self._keep(name, [found.divergence.tolist(), same])
        divergence, same = self.known[name]
        agreed = None if same is None else torch.tensor(same)
        return Outputs(torch.tensor(divergence, dtype=torch.float64), agreed, None)

    def linearity(self, stream: Any) -> tuple[float, ...]:
        """Of the blocks, on some images of the first batch."""
        if "linearity" not in self.known:
            first = slice(None, _PROFILED)
            call = self.judge.capture.form.rows(self.judge.calls[0], first)
            found = block_linearity(self.judge.model, self.judge.capture, stream, call)
            self._keep("linearity", list(found))
        return tuple(self.known["linearity"])

    def speedup(
        self, method: Method, inner: Inner, options: Mapping[str, Any], find: Callable[[], float]
    ) -> float:
        """A method's, of the first batch: as ``find`` measures it where it is not known here."""
        if not isinstance(inner, str):  # a callable's name does not say what it does
            return find()
        leaves = pytree.tree_leaves(self.judge.calls[0])
        inputs = [str((v.shape, v.dtype, v.device)) for v in leaves if isinstance(v, torch.Tensor)]
        what = [method.to_dict(), inner, dict(options), inputs, environment()]
        name = "speedup " + json.dumps(what, sort_keys=True, default=repr)
        if name not in self.known:
            self._keep(name, find())
        return float(self.known[name])

    def _keep(self, name: str, value: Any) -> None:
        self.known[name] = value
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_measurements(self.path, self.key, self.known)


def cache_path(cache: object) -> Path:
    """Where measurements are kept.

    Raises:
        TypeError: if it is no path.
    """
    if not isinstance(cache, (str, os.PathLike)) or not isinstance(os.fspath(cache), str):
        raise TypeError(f"cache must be the path of a file, got {cache!r}")
    return Path(cache)


def read_measurements(path: Path, key: str, images: int, depth: int) -> dict[str, Any] | None:
    """What a file holds, by name; None where there is no such file.

    Args:
        path: of the file.
        key: of the model and the images that were measured.
        images: how many.
        depth: blocks of the model.

    Raises:
        TomeError: if it cannot be read, is broken, or is about another model or other images.
    """
    with _as_a_cache(path):
        if not path.exists():
            return None
        if not path.is_file():  # a device may never end
            raise OSError("it is no file")
        data = path.read_bytes()
    try:
        stored = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise _broken(path, str(error)) from error
    if not isinstance(stored, dict) or not isinstance(stored.get("known"), dict):
        raise _broken(path, "expected an object with 'outputs' and 'known'")
    if stored.get("outputs") != key:
        raise TomeError(
            f"{path} holds measurements of another model or other images",
            advice="give another file, or remove it",
        )
    known: dict[str, Any] = stored["known"]
    logging.getLogger("tomepass").info("cached: %d measurements read from %s", len(known), path)
    for name, value in known.items():
        if not _fits(name, value, images, depth):
            raise _broken(path, f"what stands under {name[:60]!r} is no measurement")
    return known


def write_measurements(path: Path, key: str, known: dict[str, Any]) -> None:
    """Writes what :func:`read_measurements` reads.

    Raises:
        TomeError: if the file cannot be written.
    """
    with _as_a_cache(path):
        write_whole(path, json.dumps({"outputs": key, "known": known}))


@contextmanager
def _as_a_cache(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError: no name that a file can have
        raise TomeError(
            f"{str(path)!r} cannot be read and written as cache=: "
            f"{type(error).__name__}: {first_lines(error)}",
            advice="give a file in a folder that is there and can be written to, or no cache=",
        ) from error


def _fits(name: str, value: Any, images: int, depth: int) -> bool:
    """Is it what is kept under such a name?"""
    if name == "linearity":
        return _list_of(value, depth, _is_number)
    if name.startswith("speedup "):
        return _is_number(value)
    if not isinstance(value, list) or len(value) != 2:
        return False
    divergence, same = value
    agreed = same is None or _list_of(same, images, lambda v: isinstance(v, bool))
    return _list_of(divergence, images, _is_number) and agreed


def _list_of(value: Any, count: int, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(kind, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _broken(path: Path, why: str) -> TomeError:
    return TomeError(
        f"{path} cannot be read as measurements: {why}",
        advice="remove it, and all is measured again, or give another file as cache=",
    )
