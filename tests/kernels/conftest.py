"""What tests of kernels share: a look at the graphs that Inductor is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that Inductor is given, which are run as they are."""
    graphs: list[fx.GraphModule] = []

    def compile_fx(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    return graphs
