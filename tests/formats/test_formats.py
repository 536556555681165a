"""Every format on its own runtime: the logits of ``apply``, at any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from encoders import make, pixels

import tomepass
from tomepass import ToMe, TomeBackend, TomeError
from tomepass.formats import DOORS, Door, door
from tomepass.formats.names import arrays, input_shapes, output_names


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

    from tomepass.formats.onnx_file import OPSET

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


@pytest.mark.deep
def test_a_door_is_imported_only_when_it_is_used() -> None:
    import subprocess
    import sys

    heavy = sorted({module for form in DOORS.values() for module in form.needs})
    code = (
        "import sys; from tomepass.formats import artifacts, exporting, loading; "
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


class Difference(torch.nn.Module):
    """Two inputs that are not to be taken for each other."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first - 2 * second


@pytest.mark.parametrize("name", ["pt2", "onnx", "openvino"])
def test_inputs_are_told_apart_by_their_names(name: str, tmp_path: Path) -> None:
    form = _needs(name)
    first, second = torch.ones(2, 3), torch.full((2, 3), 5.0)
    program = torch.export.export(Difference(), (), {"first": first, "second": second})
    path = tmp_path / f"difference{form.suffix}"
    form.write(program, path)
    run = form.load(path)
    (found,) = run({"second": second, "first": first})
    assert torch.equal(found, first - 2 * second)
    if name != "pt2":
        with pytest.raises(TomeError, match="expected the inputs first, second, got first"):
            run({"first": first})


def test_nested_inputs_have_the_names_that_torch_export_gives_them() -> None:
    class Nested(torch.nn.Module):
        def forward(self, Parts: Any) -> torch.Tensor:
            return Parts[0] + Parts[1]["a.b"]

    call = {"Parts": [torch.zeros(2), {"a.b": torch.ones(2)}]}
    program = torch.export.export(Nested(), (), call)
    zeros, ones = arrays(call, list(input_shapes(program)))
    assert (zeros.sum(), ones.sum()) == (0, 2)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_model_in_bfloat16_is_refused(name: str, tmp_path: Path) -> None:
    form = _needs(name)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    program = torch.export.export(Difference(), (x, x))
    with pytest.raises(TomeError, match=r"(?s)in bfloat16.*--dtype fp32"):
        form.write(program, tmp_path / f"a{form.suffix}")
    assert not list(tmp_path.iterdir())


def test_large_weights_of_onnx_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = _needs("onnx")
    x, model = torch.ones(2, 64), torch.nn.Linear(64, 64)
    monkeypatch.setattr("tomepass.formats.onnx_file._LARGEST", 1000)
    path = tmp_path / "a.onnx"
    form.write(torch.export.export(model, (), {"input": x}), path)
    assert sorted(tmp_path.iterdir()) == sorted(form.files(path))
    assert path.stat().st_size < 64 * 64 * 4 < path.with_name("a.onnx.data").stat().st_size + 1
    (moved := tmp_path / "moved").mkdir()
    for file in form.files(path):
        file.replace(moved / file.name)
    (found,) = form.load(moved / path.name)({"input": x})
    assert (found - model(x)).abs().max() < 1e-5


def test_aotinductor_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch._inductor.aoti_compile_and_package", lambda *_, **__: pytest.fail("was compiled")
    )
    program = torch.export.export(Difference(), (torch.ones(2), torch.ones(2)))
    # Torch's own search, among compilers that are not there.
    nowhere = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    said = pytest.raises(TomeError, match=r"(?s)needs a C\+\+ compiler.*install g\+\+")
    with nowhere, said:
        DOORS["aoti"].write(program, tmp_path / "a.pt2")


@pytest.mark.doors
def test_the_backend_runs_on_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bridge falls back without a word, in two places: to Inductor, and to eager."""
    _needs("openvino")
    from openvino.frontend.pytorch.torchdynamo import backend, execute

    ran = []
    original = execute.openvino_execute

    def noted(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        ran.append(found)
        return found

    monkeypatch.setattr(execute, "openvino_execute", noted)
    monkeypatch.setattr(backend, "compile_fx", lambda *_, **__: pytest.fail("fell back"))
    model, x = make(depth=2), pixels()
    merged = tomepass.apply(model, r=[5, 0], example_inputs=x)
    options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}}
    chosen = TomeBackend(ToMe([5, 0]), inner="openvino", inner_options=options)
    compiled = torch.compile(model, backend=chosen)
    with torch.no_grad():
        found = compiled(x)
        assert (found - merged(x)).abs().max() < 1e-4
        assert (found - model(x)).abs().max() > 1e-2
    # One graph, whole, whose result is the model's.
    assert len(ran) == 1
    assert torch.equal(ran[0], found)
