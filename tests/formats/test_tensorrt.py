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
import transformers as hf
from encoders import make, pixels
from torch import fx
from torch._dynamo.backends import registry
from typer.testing import CliRunner

import tomepass
from benchmarks.__main__ import app
from tomepass import ToMe, TomeBackend, TomeError
from tomepass.formats import DOORS, tensorrt_program
from tomepass.formats.exporting import operators
from tomepass.formats.names import input_shapes
from tomepass.kernels.written_out import FOR_TENSORRT
from tomepass.ops.positions import gather

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
        self.options: dict[str, Any] = {}
        self.saved: list[Any] = []
        self.dynamo = types.SimpleNamespace(compile=self.compile)

    class Input:
        def __init__(self, shape: Any = None, **fields: Any) -> None:
            self.shape, self.fields = shape, fields

    def compile(self, program: Any, *, kwarg_inputs: Any, **options: Any) -> Any:
        self.asked.append((program, kwarg_inputs))
        self.options = options
        return torch.nn.ModuleDict({"_run_on_acc_0": torch.nn.Identity()})

    def save(self, compiled: Any, path: str, *, arg_inputs: Any, kwarg_inputs: Any) -> None:
        # As torch_tensorrt 2.13: None for arg_inputs makes it take dynamic ones for fixed.
        assert arg_inputs == ()
        self.saved.append((compiled, kwarg_inputs))
        torch.export.save(self.asked[-1][0], path)

    def load(self, path: str) -> Any:
        return torch.export.load(path)


def test_engines_are_written_and_loaded(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, form, path = Recorder(), DOORS["tensorrt"], tmp_path / "vit.pt2"
    monkeypatch.setitem(sys.modules, "torch_tensorrt", recorder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TomeError, match="needs a CUDA device"):
        form.write(exported.program, path)
    moved: list[Any] = []
    monkeypatch.setattr(tensorrt_program, "_on_cuda", lambda p: moved.append(p) or p)
    form.write(exported.program, path)
    assert moved == [exported.program]
    assert recorder.options == {"arg_inputs": (), "disable_tf32": True}
    ((compiled, inputs),) = recorder.saved
    assert tensorrt_program.engines(compiled) == 1
    assert inputs["pixel_values"].fields["max_shape"][0] == form.most
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    assert max(exported.errors(form.load(path)).values()) < 1e-4


def test_a_program_is_handed_over_with_its_ranges_of_shapes(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", recorder)
    compiled = tensorrt_program.compile_program(exported.program)
    assert tensorrt_program.engines(compiled) == 1
    ((program, inputs),) = recorder.asked
    given, handed = operators(exported.program), operators(program)
    # Which token a merge is measured from is gathered; that is written out as a product.
    fewer = {name for name, count in given.items() if handed.get(name, 0) < count}
    assert fewer == {"aten.gather.default"}
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


# At the sizes their configs have by themselves: twelve blocks of width 768.
BASE: dict[str, Callable[[], Any]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig()),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config()),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig()),
}


@pytest.mark.doors
@pytest.mark.skipif(
    _package() is None, reason="needs pip install --no-deps torch_tensorrt, or its wheel unpacked"
)
@pytest.mark.parametrize("name", BASE)
def test_every_operator_converts_into_one_engine(name: str, tmp_path: Path) -> None:
    program = tomepass.export(BASE[name]().eval(), r=16)
    (shape,) = input_shapes(program).values()
    assert shape == [-1, 3, 224, 224]
    found = _read(tensorrt_program.written_out(program), tmp_path)
    assert found["missing"] == []
    assert found["supported"] == found["operators"] > 500
    assert (found["engines"], found["in torch"]) == (1, 0)


@pytest.mark.doors
@pytest.mark.skipif(
    _package() is None, reason="needs pip install --no-deps torch_tensorrt, or its wheel unpacked"
)
def test_what_does_not_convert_is_reported(shared_models: Any, tmp_path: Path) -> None:
    """The gather of a dynamic batch, which is written out for TensorRT, is what stops it."""
    program = tomepass.export(shared_models["siglip_vision"], ToMe([8, 6, 4]))
    found = _read(program, tmp_path)
    assert found["missing"] == ["aten.gather.default"]
    assert found["supported"] < found["operators"]
    assert found["engines"] + found["in torch"] > 1


def _read(program: Any, folder: Path) -> Any:
    """What torch_tensorrt does with a program, asked in a process that its stand-ins are for."""
    path = folder / "program.pt2"
    torch.export.save(program, path)
    command = [sys.executable, str(READER), str(_package()), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    path.unlink()  # some 350 MB
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[-1].removeprefix("RESULT "))["program"]


@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((3, 5, 4), 1), ((3, 2, 5, 4), 2)])
def test_a_gather_of_tokens_is_written_out(shape: tuple[int, ...], dim: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=drawn)
    index = torch.randint(5, (3, 7), generator=drawn)

    class Taken(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return gather(x, index, dim)

    program = torch.export.export(Taken(), (x, index))
    written = program.run_decompositions(FOR_TENSORRT)
    assert "aten.gather.default" in operators(program)
    assert "aten.gather.default" not in operators(written)
    assert torch.equal(written.module()(x, index), gather(x, index, dim))


def test_another_gather_is_left_alone() -> None:
    class Taken(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return x.gather(1, index)

    inputs = (torch.randn(3, 5, 4), torch.randint(5, (3, 7, 4)))
    written = torch.export.export(Taken(), inputs).run_decompositions(FOR_TENSORRT)
    assert "aten.gather.default" in operators(written)


def test_the_benchmark_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    result = CliRunner().invoke(app, ["tensorrt", "--r", "8"])
    assert result.exit_code == 2
    assert "pip install 'tomepass[tensorrt]'" in result.output
