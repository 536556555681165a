"""Libraries of the extras, imported when they are used."""

from __future__ import annotations

import importlib

from tomepass.errors import TomeError


def import_extra(module: str, extra: str | None, what: str) -> None:
    """Imports what an extra of this package installs.

    Args:
        module: its name.
        extra: as in ``pip install 'tomepass[extra]'``.
        what: is asked for, as the error is to say it.

    Raises:
        TomeError: if it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # torch_tensorrt raises bare Exceptions without a driver
        raise TomeError(
            f"{what} needs {module}, which cannot be imported: {error}",
            advice=f"pip install 'tomepass[{extra}]'",
        ) from error
