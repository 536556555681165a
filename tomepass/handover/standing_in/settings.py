"""Saves and loads a merged model in the way of HuggingFace.

The model is saved as usual, with a file ``tomepass.json`` beside it that holds the method and the
options of ``apply``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from tomepass.errors import TomeError
from tomepass.handover.choices import Outputs
from tomepass.methods import Method, method_from_dict
from tomepass.sources.files import write_whole
from tomepass.sources.models import first_line, locate

FILE = "tomepass.json"

VERSION = 1

_FIELDS = ("version", "method", "outputs")


def save(
    model: nn.Module,
    method: Method,
    outputs: Outputs,
    directory: str | os.PathLike[str],
    **options: Any,
) -> Any:
    """Saves a model as usual, and beside it what is needed to apply the same method again.

    Raises:
        TomeError: if the model has no ``save_pretrained`` of its own, ``directory`` is a file, or
            the model is to be pushed to the hub.
    """
    if (own := getattr(model, "save_pretrained", None)) is None:
        raise TomeError(
            f"{type(model).__name__} has no save_pretrained",
            advice="save its state_dict(), and the method: merged.tome.method.to_json()",
        )
    if options.get("push_to_hub"):  # which would upload before there is a tomepass.json
        refuse_to_push()
    if Path(directory).is_file():
        raise TomeError(f"{os.fspath(directory)!r} is a file; expected a directory")
    saved = own(directory, **options)
    data = {"version": VERSION, "method": method.to_dict(), "outputs": outputs}
    write_whole(Path(directory) / FILE, json.dumps(data, indent=1) + "\n")
    return saved


def refuse_to_push() -> NoReturn:
    """Raises: transformers would push the model alone, and it would come back with r=16."""
    raise TomeError(
        f"a merged model is not pushed to the hub: {FILE} would not go with it",
        advice="merged.save_pretrained(DIR), then upload the folder: hf upload OWNER/NAME DIR",
    )


def read_settings(name: str | os.PathLike[str]) -> tuple[Method, Outputs] | None:
    """What the ``tomepass.json`` of a directory or a hub id says; None where there is none.

    Raises:
        TomeError: if it is not one that this version reads, or if there is no such model.
    """
    if (path := _settings_file(locate(os.fspath(name)))) is None:
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


def _settings_file(source: str) -> Path | None:
    """Where the settings of a located model are, fetched if it is a hub id; None if it has none."""
    if (folder := Path(source)).is_dir():
        return folder / FILE if (folder / FILE).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, FILE))
    except Exception as error:  # a connection error of any library
        absent = isinstance(error, EntryNotFoundError)
        if absent and not isinstance(error, LocalEntryNotFoundError):  # the hub's own answer
            return None
        raise TomeError(
            f"whether {source!r} has a {FILE} cannot be found out: {first_line(error)}",
            advice="say what to do instead: tomepass.apply(model, r=16), or --r 16",
        ) from error


def _unreadable(reason: str, advice: str | None = None) -> TomeError:
    advice = advice or "save the model again with merged.save_pretrained(DIR)"
    return TomeError(f"{FILE} cannot be read: {reason}", advice=advice)
