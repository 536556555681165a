"""The method that a command line asks for: named, saved beside the model, or the standard one."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tomepass.counts.schedule import Schedule
from tomepass.errors import TomeError
from tomepass.handover.choices import Outputs
from tomepass.handover.standing_in.settings import read_settings
from tomepass.methods import Method, ToMe
from tomepass.sources.models import load_model


def chosen_method(
    name: str, r: Schedule | None = None, plan: Path | None = None
) -> tuple[nn.Module, Method, Outputs]:
    """A model, what to do with it and what it is to return.

    What was saved goes together: a method that is asked for comes with "original" outputs, and
    where nothing is asked for or saved it is ``ToMe()``.

    Raises:
        TomeError: if both are asked for, or a file is not what it should be.
    """
    if r is not None and plan is not None:
        raise TomeError("give either --r or --plan, not both")
    outputs: Outputs = "original"
    if plan is not None:
        from tomepass.calibration.values import Plan

        if not plan.is_file():
            raise TomeError(f"no such plan: {str(plan)!r}", advice="Plan.save() writes one")
        method = Plan.load(plan).method
    elif r is not None:
        method = ToMe(r)
    else:
        method, outputs = read_settings(name) or (ToMe(), outputs)
    return load_model(name), method, outputs
