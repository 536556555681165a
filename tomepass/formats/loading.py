"""Loading what was saved or exported: a merged model, or the module that runs a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tomepass.handover.applying import apply
from tomepass.handover.choices import Outputs
from tomepass.handover.standing_in.settings import FILE, read_settings
from tomepass.methods import Method, ToMe
from tomepass.sources.models import load_model


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
        TypeError: on options for an exported program, which is merged already.
    """
    if Path(path).suffix == ".pt2":
        from tomepass.formats.pt2 import load_module

        if options:
            raise TypeError(f"an exported program takes no options, got {', '.join(options)}")
        return load_module(Path(path).expanduser())
    settings = read_settings(path) or _standard(path)
    method, outputs = settings
    return apply(load_model(os.fspath(path)), method, **{"outputs": outputs, **options})


def _standard(path: str | os.PathLike[str]) -> tuple[Method, Outputs]:
    print(f"tomepass: no {FILE} in {os.fspath(path)!r}, merging with {ToMe()!r}", file=sys.stderr)
    return ToMe(), "original"
