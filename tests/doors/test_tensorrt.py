"""TensorRT, as far as it goes without its libraries: what is handed over, and what converts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import make, pixels
from torch import fx
from torch._dynamo.backends import registry
from typer.testing import CliRunner
from zoo import make_inputs

import tomepass
from benchmarks.__main__ import app
from tomepass import ToMe, TomeBackend
from tomepass.doors import tensorrt_program

READER = Path(__file__).parent / "tensorrt_registry.py"


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Graphs that a backend named tensorrt is given, which runs them as they are."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm

    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    monkeypatch.setitem(registry._BACKENDS, "tensorrt", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "tensorrt", backend)
    return graphs


def test_the_backend_is_handed_plain_operators(handed: list[fx.GraphModule]) -> None:
    model, x = make(depth=2), pixels()
    merged = tomepass.apply(model, r=4, example_inputs=x)
    compiled = torch.compile(model, backend=TomeBackend(ToMe(4), inner="tensorrt"))
    with torch.no_grad():
        assert (compiled(x) - merged(x)).abs().max() < 1e-4
        assert (compiled(x) - model(x)).abs().max() > 1e-3
    (graph,) = handed
    names = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert not [name for name in names if name.startswith("tome")]
    assert "aten.scaled_dot_product_attention.default" in names


class Recorder(types.ModuleType):
    """Stands in for torch_tensorrt: keeps what it is asked to compile."""

    def __init__(self) -> None:
        super().__init__("torch_tensorrt")
        self.asked: list[tuple[Any, Any]] = []
        self.dynamo = types.SimpleNamespace(compile=self.compile)

    class Input:
        def __init__(self, shape: Any = None, **fields: Any) -> None:
            self.shape, self.fields = shape, fields

    def compile(self, program: Any, *, kwarg_inputs: Any) -> Any:
        self.asked.append((program, kwarg_inputs))
        return torch.nn.ModuleDict({"_run_on_acc_0": torch.nn.Identity()})


def test_a_program_is_handed_over_with_its_ranges_of_shapes(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", recorder)
    compiled = tensorrt_program.compile_program(exported.program)
    assert tensorrt_program.engines(compiled) == 1
    ((program, inputs),) = recorder.asked
    assert program is exported.program
    least, usual, most = tensorrt_program.BATCHES
    fields = inputs["pixel_values"].fields
    assert fields["min_shape"] == [least, 3, 32, 32]
    assert fields["opt_shape"] == [usual, 3, 32, 32]
    assert fields["max_shape"] == [most, 3, 32, 32]


def _package() -> Path | None:
    """The folder of torch_tensorrt: installed without what it needs, or an unpacked wheel."""
    if (given := os.environ.get("TOMEPASS_TORCH_TENSORRT")) is not None:
        return Path(given)
    found = importlib.util.find_spec("torch_tensorrt")
    return None if found is None or found.origin is None else Path(found.origin).parent


@pytest.mark.doors
@pytest.mark.skipif(
    _package() is None, reason="needs pip install --no-deps torch_tensorrt, or its wheel unpacked"
)
def test_every_operator_of_three_families_converts_into_one_engine(
    shared_models: Any, tmp_path: Path
) -> None:
    # SigLIP returns its tokens unmerged, by a gather: its converter is for fixed shapes alone.
    dynamic = {"vit": True, "dinov2_registers": True, "siglip_vision": False}
    names = tuple(dynamic)
    for name in names:
        program = tomepass.export(
            shared_models[name],
            ToMe([8, 6, 4]),
            example_inputs=make_inputs(name),
            dynamic_batch=dynamic[name],
        )
        torch.export.save(program, tmp_path / f"{name}.pt2")
    archives = [tmp_path / f"{name}.pt2" for name in names]
    command = [sys.executable, str(READER), str(_package()), *map(str, archives)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    for name, found in json.loads(lines[-1].removeprefix("RESULT ")).items():
        assert found["missing"] == [], (name, found["missing"])
        assert found["supported"] == found["operators"] > 50, name
        assert (found["engines"], found["in torch"]) == (1, 0), name


def test_the_benchmark_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    result = CliRunner().invoke(app, ["tensorrt", "--r", "8"])
    assert result.exit_code == 2
    assert "pip install 'tomepass[tensorrt]'" in result.output
