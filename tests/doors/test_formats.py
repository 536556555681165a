"""Every format on its own runtime: the logits of ``apply``, at any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tomepass import TomeError
from tomepass.doors import DOORS, Door, door
from tomepass.doors.names import input_shapes, output_names


def _needs(name: str) -> Door:
    for module in DOORS[name].needs:
        pytest.importorskip(module)
    return DOORS[name]


@pytest.mark.parametrize(
    "name", ["pt2", "onnx", "openvino", pytest.param("aoti", marks=pytest.mark.doors)]
)
def test_a_written_file_gives_the_logits_of_apply(name: str, exported: Any, tmp_path: Path) -> None:
    form = _needs(name)
    path = tmp_path / f"vit{form.suffix}"
    form.write(exported.program, path)
    errors = exported.errors(form.load(path))
    assert max(errors.values()) < 1e-4, errors
    if name == "onnx":
        _check_onnx(path)
    if name == "openvino":
        _check_openvino(path)


def _check_onnx(path: Path) -> None:
    import onnx

    from tomepass.doors.onnx_file import OPSET

    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    (put,) = model.graph.input
    batch, *sizes = put.type.tensor_type.shape.dim
    assert batch.dim_param
    assert [size.dim_value for size in sizes] == [3, 32, 32]
    assert [put.name for put in model.graph.output] == ["logits"]


def _check_openvino(path: Path) -> None:
    import openvino

    model = openvino.Core().read_model(path)
    (put,), (out,) = model.inputs, model.outputs
    assert str(put.partial_shape) == "[?,3,32,32]"
    assert out.get_names() == {"logits"}
    assert path.with_suffix(".bin").is_file()


def test_names_and_shapes_are_the_models_own(exported: Any) -> None:
    assert input_shapes(exported.program) == {"pixel_values": [-1, 3, 32, 32]}
    assert output_names(exported.program) == ["logits"]


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(TomeError, match="unknown format 'tflite'; known: pt2, aoti, onnx"):
        door("tflite")


@pytest.mark.parametrize("name", [name for name, form in DOORS.items() if form.extra])
def test_a_runtime_that_is_not_installed_names_the_extra(
    name: str, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in DOORS[name].needs:
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(TomeError, match=rf"pip install 'tomepass\[{DOORS[name].extra}\]'"):
        DOORS[name].write(exported.program, tmp_path / f"vit{DOORS[name].suffix}")
    assert not list(tmp_path.iterdir())


def test_a_door_is_imported_only_when_it_is_used() -> None:
    import subprocess
    import sys

    heavy = sorted({module for form in DOORS.values() for module in form.needs})
    code = (
        "import sys, tomepass.doors, tomepass.exporting, tomepass.artifacts, tomepass.saving; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "[]", printed.stderr


def test_an_operator_onnx_cannot_hold_is_named(tmp_path: Path) -> None:
    _needs("onnx")

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = torch.export.export(Odd(), (torch.ones(2, 3),))
    with pytest.raises(TomeError, match=r"(?s)torch.onnx.export failed.*bessel_j0"):
        DOORS["onnx"].write(program, tmp_path / "odd.onnx")
