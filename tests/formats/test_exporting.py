"""``tomepass.export``: plain ATen that runs where this package is not, for every method."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import make, pixels
from zoo import make_inputs, make_model, make_vit

import tomepass
from tomepass import MLERP, ToMe, TomeError
from tomepass.formats import DOORS
from tomepass.formats.exporting import operators
from tomepass.ops.library import COMPOSITES

sys.path.append(str(Path(__file__).parent.parent / "methods"))
from table import ROWS

BATCHES = (1, 2, 7)

# Runs where neither package can be imported, as on another machine.
ELSEWHERE = """
import sys
sys.modules.update(tomepass=None, transformers=None)
import torch
archive, inputs = sys.argv[1:]
module = torch.export.load(archive).module()
for x, logits in torch.load(inputs).values():
    print(float((module(pixel_values=x)["logits"] - logits).abs().max()))
"""


def test_no_operator_but_pytorchs_own_is_left(exported: Any) -> None:
    targets = [n.target for n in exported.program.graph.nodes if n.op == "call_function"]
    overloads = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    assert {t.namespace for t in overloads} == {"aten"}
    assert not any(t._schema.is_mutable or "scatter_reduce" in t.name() for t in overloads)


def test_attention_and_norms_stay_whole(exported: Any) -> None:
    found = operators(exported.program)
    assert found["aten.scaled_dot_product_attention.default"] == 2
    assert found["aten.layer_norm.default"] == 5
    assert "aten.softmax.int" not in found


@pytest.mark.deep
def test_it_loads_and_runs_without_tomepass_and_transformers(
    exported: Any, archive: Path, tmp_path: Path
) -> None:
    torch.save(exported.expected, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(archive), str(tmp_path / "inputs.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    errors = [float(line) for line in printed.stdout.split()]
    assert len(errors) == len(BATCHES)
    assert max(errors) < 1e-4


def test_merging_is_in_it(exported: Any) -> None:
    x, logits = exported.expected[2]
    with torch.no_grad():
        assert (exported.model(x).logits - logits).abs().max() > 1e-2


def test_an_archive_names_no_file_of_this_machine(archive: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        (model,) = [name for name in opened.namelist() if name.endswith("models/model.json")]
        text = opened.read(model).decode()
    assert str(Path(tomepass.__file__).parent) not in text
    assert "site-packages" not in text


@pytest.mark.deep
def test_the_model_is_left_as_it_was(exported: Any) -> None:
    model = make(depth=1)
    before = (dict(model.__dict__), {n: v.clone() for n, v in model.state_dict().items()})
    tomepass.export(model, r=4, example_inputs=pixels())
    assert dict(model.__dict__) == before[0]
    assert all(torch.equal(v, before[1][n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("siglip_vision", marks=pytest.mark.deep),
        *(pytest.param(n, marks=pytest.mark.doors) for n in ("dinov2_registers", "ast")),
    ],
)
def test_other_families_at_a_fixed_batch(name: str, shared_models: Any) -> None:
    model, inputs = shared_models[name], make_inputs(name)
    method = ToMe([8])
    merged = tomepass.apply(model, method, example_inputs=inputs)
    program = tomepass.export(model, method, example_inputs=inputs, dynamic_batch=False)
    ours = torch.utils._pytree.tree_leaves(program.module()(**inputs))
    theirs = torch.utils._pytree.tree_leaves(merged(**inputs))
    assert len(ours) == len(theirs)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(ours, theirs, strict=True))


OPTIONS: dict[str, Any] = {
    "mlerp": ToMe([5], combine=MLERP("max")),
    "random": ToMe([5], partition="random"),
    "euclidean": ToMe([5], similarity="euclidean"),
    "importance": ToMe([5], importance="class_attention"),
}
# Their rows are of three blocks.
ONE_BLOCK: dict[str, Any] = {
    "tofu_measured": {"strategies": ("prune",)},
    "diffrate_shares": {"pruned": (0.8,)},
}
TWO_BLOCKS: dict[str, Any] = {
    "diffrate_shares": {"pruned": (0.8, 0.0)},
    "tofu_measured": {"strategies": ("prune", "merge")},
    **{name: {"r": [5, 0]} for name in OPTIONS},
}
WIDTH = 32  # of the policies' weights in the table
# A method of each kind; the others are run by `make test-doors`.
FEW = ("evit", "pitome", "kmeans", "threshold")
FEWER = ("threshold",)  # every time; the others deep


@pytest.mark.parametrize(
    "name",
    [
        *FEWER,
        *(pytest.param(n, marks=pytest.mark.deep) for n in FEW if n not in FEWER),
        *(pytest.param(n, marks=pytest.mark.doors) for n in (*ROWS, *OPTIONS) if n not in FEW),
    ],
)
def test_every_method_goes_through(name: str) -> None:
    # Of one block the class token alone would show nothing of what merged.
    model, x = make(depth=1, width=WIDTH, readout="mean"), pixels()
    made = OPTIONS[name] if name in OPTIONS else ROWS[name].make([5])
    method = made.replace(**ONE_BLOCK.get(name, {}))
    expected = tomepass.apply(model, method, example_inputs=x)(x)
    program = tomepass.export(model, method, example_inputs=x, dynamic_batch=False)
    (given,) = program.example_inputs[1]
    found = program.module()(**{given: x})
    assert (found - expected).abs().max() < 1e-4
    assert (expected - model(x)).abs().max() > 1e-3
    assert not any("tome" in target for target in operators(program))


def _in_two(name: str) -> Any:
    """As above for two blocks: what the first does shows in the logits, the class token's alone."""
    made = OPTIONS[name] if name in OPTIONS else ROWS[name].make([5, 0])
    return made.replace(**TWO_BLOCKS.get(name, {}))


@pytest.mark.doors
@pytest.mark.parametrize("name", [*ROWS, *OPTIONS])
def test_every_method_keeps_a_dynamic_batch(name: str) -> None:
    model, method = make(depth=2, width=WIDTH), _in_two(name)
    program = tomepass.export(model, method, example_inputs=pixels())
    merged = tomepass.apply(model, method, example_inputs=pixels())
    (given,) = program.example_inputs[1]
    for batch in (1, 7):
        x = pixels(batch)
        assert (program.module()(**{given: x}) - merged(x)).abs().max() < 1e-4, batch


@pytest.mark.doors
@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("name", [*ROWS, *OPTIONS])
def test_every_method_reaches_other_runtimes(name: str, to: str, tmp_path: Path) -> None:
    form = DOORS[to]
    for module in form.needs:
        pytest.importorskip(module)
    model, method = make(depth=2, width=WIDTH), _in_two(name)
    merged = tomepass.apply(model, method, example_inputs=pixels())
    program = tomepass.export(model, method, example_inputs=pixels())
    form.write(program, tmp_path / f"a{form.suffix}")
    run = form.load(tmp_path / f"a{form.suffix}")
    (given,) = program.example_inputs[1]
    for batch in BATCHES:
        x = pixels(batch)
        (found,) = run({given: x})
        assert (found - merged(x)).abs().max() < 1e-4, batch


# What is refused


def test_an_operator_without_a_converter_is_named() -> None:
    method = ToMe(4, combine="max")
    with pytest.raises(TomeError, match=r"aten::scatter_reduce.two cannot be exported"):
        tomepass.export(make(depth=1), method, example_inputs=pixels(), dynamic_batch=False)


def test_an_operator_of_another_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tomepass.ops.merging.merge import merge

    monkeypatch.delitem(COMPOSITES, merge)
    with pytest.raises(TomeError, match="tome::merge cannot be exported: it is not an operator"):
        tomepass.export(make(depth=1), r=4, example_inputs=pixels(), dynamic_batch=False)


@pytest.mark.parametrize("asked", [{"x": {2: "height"}}, "resolution", None, 1])
def test_a_dynamic_resolution_is_refused(asked: Any) -> None:
    with pytest.raises(TomeError, match=r"(?s)the resolution is fixed.*once for each resolution"):
        tomepass.export(make(depth=1), r=4, example_inputs=pixels(), dynamic_batch=asked)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(TomeError, match=r"(?s)training mode.*model.eval\(\)"):
        tomepass.export(make(depth=1).train(), r=4, example_inputs=pixels())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (ToMe(4, adaptive=(0.1, 0.2)), "routes images to several graphs"),
        (ToMe(4, trace_source=True), "no source map"),
    ],
)
def test_what_a_program_cannot_hold_is_refused(method: ToMe, said: str) -> None:
    with pytest.raises(TomeError, match=said):
        tomepass.export(make(depth=1), method, example_inputs=pixels())


def test_a_model_that_is_refused_says_why() -> None:
    with pytest.raises(TomeError, match="expected attention over all tokens"):
        tomepass.export(make_model("swin"), r=4)


def test_the_method_of_an_applied_model_is_taken() -> None:
    x = pixels()
    merged = tomepass.apply(make(depth=1), r=3, example_inputs=x)
    program = tomepass.export(merged, example_inputs=x, dynamic_batch=False)
    (given,) = program.example_inputs[1]
    assert torch.equal(program.module()(**{given: x}), merged(x))


@pytest.mark.deep
def test_a_plan_is_exported_as_its_method() -> None:
    x, model = pixels(), make(depth=2)
    found = tomepass.Plan(ToMe([5, 0]), 1.2, "as measured", (), "inductor", ())
    program = tomepass.export(model, found, example_inputs=x, dynamic_batch=False)
    (given,) = program.example_inputs[1]
    expected = tomepass.apply(model, r=[5, 0], example_inputs=x)(x)
    assert torch.equal(program.module()(**{given: x}), expected)
    assert not torch.equal(expected, model(x))


def test_the_outputs_of_an_applied_model_are_taken() -> None:
    model, x = make_vit(num_hidden_layers=1).vit, torch.randn(2, 3, 32, 32)
    merged = tomepass.apply(model, r=[3], example_inputs=x, outputs="merged")
    found = {}
    for outputs in (None, "original"):
        program = tomepass.export(merged, example_inputs=x, dynamic_batch=False, outputs=outputs)
        found[outputs] = program.module()(pixel_values=x)["last_hidden_state"]
    assert {name: hidden.shape[1] for name, hidden in found.items()} == {None: 62, "original": 65}
    assert torch.equal(found[None], merged(x).last_hidden_state)
    whole = tomepass.apply(model, r=[3], example_inputs=x)(x)
    assert torch.equal(found["original"], whole.last_hidden_state)
