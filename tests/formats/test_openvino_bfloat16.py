"""OpenVINO in bfloat16, with the merges of a float32 run replayed: as close as PyTorch is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass import ToMe
from tomepass.capture.captured import read_state
from tomepass.handover.applied import make_applied
from tomepass.kernels.written_out import FOR_RUNTIMES
from tomepass.ops.choices import CHOICES
from tomepass.ops.library import COMPOSITES
from tomepass.proof.check import LOW_PRECISION_RATIO
from tomepass.proof.recorded import record
from tomepass.proof.replay import replayed

pytestmark = pytest.mark.doors


def _run(model: nn.Module, x: Tensor, assigns: list[Tensor]) -> Tensor:
    applied = make_applied(model, ToMe([8, 6]), {"pixel_values": x})
    assert applied.graph is not None
    logits: Tensor
    logits, *_ = replayed(applied.graph)(*read_state(model, applied.capture), x, *assigns)
    return logits.double()


class Replayed(nn.Module):
    """A merged model that is told where its tokens go."""

    def __init__(self, graph: Any, state: list[Tensor]) -> None:
        super().__init__()
        self.graph = graph
        for number, value in enumerate(state):
            self.register_buffer(f"state_{number}", value.detach())
        self.count = len(state)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        state = [getattr(self, f"state_{number}") for number in range(self.count)]
        logits: Tensor = self.graph(*state, x, first, second)[0]
        return logits


def test_replayed_bfloat16_is_no_further_from_float64_than_twice_pytorchs(exported: Any) -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bfloat16")
    model, (x, _) = exported.model, exported.expected[2]
    applied = make_applied(model, ToMe([8, 6]), {"pixel_values": x})
    state = read_state(model, applied.capture)
    with torch.no_grad():
        calls = record(applied, [*state, x]).calls_of(*CHOICES)
        assigns = pytree.tree_leaves([call.result for call in calls])
        truth = _run(copy.deepcopy(model).double(), x.double(), assigns)
        eager = _run(copy.deepcopy(model).bfloat16(), x.bfloat16(), assigns)
        held = Replayed(replayed(applied.graph), state)
        program = torch.export.export(held, (x, *assigns), strict=False)
        program = program.run_decompositions({**COMPOSITES, **FOR_RUNTIMES})
    hints = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = core.compile_model(openvino.convert_model(program), "CPU", hints)
    found = torch.from_numpy(compiled([v.numpy() for v in (x, *assigns)])[0]).double()
    errors = [float((v - truth).norm() / truth.norm()) for v in (found, eager)]
    assert errors[1] > 1e-4, "bfloat16 should show"
    assert errors[0] > 1e-4, "OpenVINO did not compute in bfloat16"
    assert errors[0] < LOW_PRECISION_RATIO * errors[1], errors
