"""Saving in the HuggingFace way: the model as usual, and ``tomepass.json`` beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from tomepass.errors import TomeError
from tomepass.loading import load_model
from tomepass.methods import Method, ToMe, method_from_dict
from tomepass.module import MergedModel, Outputs, apply
from tomepass.schedule import Schedule

FILE = "tomepass.json"
VERSION = 1
_FIELDS = ("version", "method", "outputs")


def write_settings(merged: MergedModel, directory: str | os.PathLike[str]) -> None:
    """Writes what is needed to apply the same again: ``tomepass.json`` in a directory."""
    data = {
        "version": VERSION,
        "method": merged.method.to_dict(),
        "outputs": merged.outputs,
    }
    path = Path(directory) / FILE
    aside = path.with_name(f".{FILE}.{os.getpid()}")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    aside.replace(path)


def read_settings(directory: str | os.PathLike[str]) -> tuple[Method, Outputs] | None:
    """What a ``tomepass.json`` says; None where there is none.

    Raises:
        TomeError: if it is not one that this version reads.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(f"it is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise _unreadable(f"expected an object, got {type(data).__name__}")
    if (version := data.get("version")) != VERSION:
        raise _unreadable(
            f"it is of version {version!r}, this tomepass reads version {VERSION}",
            advice="update tomepass, or save the model again",
        )
    if unknown := sorted(set(data) - {*_FIELDS}):
        raise _unreadable(f"unknown fields {unknown}; known: {', '.join(_FIELDS)}")
    if missing := [name for name in _FIELDS if name not in data]:
        raise _unreadable(f"fields are missing: {', '.join(missing)}")
    try:
        method = method_from_dict(data["method"])
    except TomeError as error:
        raise _unreadable(error.reason) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(f"its method is none: {error}") from error
    if data["outputs"] not in ("original", "merged"):
        raise _unreadable(f"outputs is {data['outputs']!r}; known: original, merged")
    return method, data["outputs"]


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """A model saved by ``merged.save_pretrained``, merged as it was; or an exported program.

    Args:
        path: a directory, or a hub id. Without a ``tomepass.json`` the model is merged with
            ``ToMe()``, r=16, and a note on standard error says so. A ``.pt2`` file of
            :func:`tomepass.export` comes back as the module that runs it.
        options: of :func:`tomepass.apply`, such as ``example_inputs``.

    Raises:
        TomeError: if there is no model, it cannot be merged, or ``tomepass.json`` is not one that
            this version reads.
    """
    if Path(path).suffix == ".pt2":
        from tomepass.doors.pt2 import load_module

        return load_module(Path(path))
    settings = read_settings(path) or _standard(path)
    method, outputs = settings
    return apply(load_model(os.fspath(path)), method, **{"outputs": outputs, **options})


def chosen_method(
    name: str, r: Schedule | None = None, plan: Path | None = None
) -> tuple[nn.Module, Method]:
    """A model and what to do with it: as asked for, else as saved with it, else ``ToMe()``.

    Raises:
        TomeError: if both are asked for, or a file is not what it should be.
    """
    if r is not None and plan is not None:
        raise TomeError("give either --r or --plan, not both")
    saved = read_settings(name)
    if plan is not None:
        from tomepass.plans import Plan

        if not plan.is_file():
            raise TomeError(f"no such plan: {str(plan)!r}", advice="Plan.save() writes one")
        method = Plan.load(plan).method
    elif r is not None:
        method = ToMe(r)
    else:
        method = saved[0] if saved is not None else ToMe()
    return load_model(name), method


def _standard(path: str | os.PathLike[str]) -> tuple[Method, Outputs]:
    print(f"tomepass: no {FILE} in {os.fspath(path)!r}, merging with {ToMe()!r}", file=sys.stderr)
    return ToMe(), "original"


def _unreadable(reason: str, advice: str | None = None) -> TomeError:
    advice = advice or "save the model again with merged.save_pretrained(DIR)"
    return TomeError(f"{FILE} cannot be read: {reason}", advice=advice)
