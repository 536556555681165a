"""``tomepass export``: a whole, checked file or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from zoo import make_model, make_vit

import tomepass
from tomepass import EViT, Plan, ToMe, TomeError
from tomepass.cli.commands import app
from tomepass.formats import DOORS, Door, artifacts
from tomepass.formats.artifacts import Parity, Writing, check_path, parity, write_artifact
from tomepass.sources.models import load_model


def _run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["export", *args], env={"COLUMNS": "120"})
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def stand_in(exported: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exported program for any model, so that a test need not wait for an export."""
    expected = exported.expected

    class Merged:
        def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return exported.program.module()(pixel_values=pixel_values)["logits"]

    monkeypatch.setattr(artifacts, "export", lambda *_, **__: exported.program)
    monkeypatch.setattr(artifacts, "export_unmerged", lambda *_, **__: exported.program)
    monkeypatch.setattr(artifacts, "apply", lambda *_, **__: Merged())
    return expected


@pytest.mark.deep
def test_the_command_writes_a_file_and_prints_how_close_it_is(
    model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "vit.pt2"
    args = ("--model", str(model_dir), "--r", "8", "--to", "pt2", "-o", str(out), "--batch", "2")
    printed = _run(*args, "--no-speed")
    assert "vit.pt2 against apply" in printed
    assert [line.split()[0] for line in printed.splitlines() if "100 %" in line] == ["1", "2", "7"]
    assert [p.name for p in tmp_path.iterdir()] == ["vit.pt2"]
    assert "'vit.pt2' exists" in _run(*args, status=2).replace("\n", "")


@pytest.mark.doors
@pytest.mark.parametrize(
    ("to", "names"), [("openvino", ["vit.bin", "vit.xml"]), ("onnx", ["vit.onnx"])]
)
def test_the_command_with_another_runtime(
    to: str, names: list[str], model_dir: Path, tmp_path: Path
) -> None:
    for module in DOORS[to].needs:
        pytest.importorskip(module)
    args = ("--model", str(model_dir), "--r", "8", "--to", to, "-o", str(tmp_path / names[-1]))
    printed = _run(*args, "--batch", "2")
    assert [line.split()[0] for line in printed.splitlines() if "100 %" in line] == ["1", "2", "7"]
    assert f"{DOORS[to].runtime}, batch 2:" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    merged = tomepass.apply(load_model(model_dir), r=8)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    (logits,) = DOORS[to].load(tmp_path / names[-1])({"pixel_values": x})
    with torch.no_grad():
        assert (logits - merged(x).logits).abs().max() < 1e-4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks of ``write_artifact``, which is not run."""
    kept: dict[str, Any] = {}

    def stand_in(model: Any, method: Any, to: str, path: Path, how: Any, **options: Any) -> Any:
        kept.update(vars(how), **options, model=model, method=method)
        rows = (Parity(1, 0.0, 0.0, 1.0),)
        return artifacts.Artifact(path, DOORS[to], rows, None, 1)

    monkeypatch.setattr(artifacts, "write_artifact", stand_in)
    return kept


def test_a_plan_goes_before_what_was_saved(asked: Any, tmp_path: Path) -> None:
    method = EViT(keep_rate=0.6)
    made = make_vit(num_hidden_layers=1)
    tomepass.apply(made, ToMe(5), outputs="merged").save_pretrained(tmp_path / "saved")
    Plan(method, 1.2, "as measured", (), "inductor", ()).save(tmp_path / "plan.json")
    args = ("--model", str(tmp_path / "saved"), "--to", "pt2", "-o", str(tmp_path / "vit.pt2"))
    _run(*args)
    assert (asked["method"], asked["outputs"], asked["dynamic_batch"]) == (ToMe(5), "merged", True)
    plan = ("--plan", str(tmp_path / "plan.json"), "--dynamic", "none")
    _run(*args, *plan, "--dtype", "bf16", "--tolerance", "0.2")
    assert (asked["method"], asked["outputs"], asked["dynamic_batch"]) == (
        method,
        "original",
        False,
    )
    assert asked["model"].dtype is torch.bfloat16
    assert asked["tolerance"] == 0.2


def test_a_folder_that_cannot_be_written_to_is_said(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "write_artifact", full)
    args = ("--model", str(model_dir), "--to", "pt2", "-o", str(tmp_path / "vit.pt2"))
    assert "error: [Errno 28] No space left on device" in _run(*args, status=2)


class Noted(Door):
    """Writes a word for a program, and notes which file runs on how many images."""

    ran: list[tuple[str, int]] = []  # noqa: RUF012 - each fixture makes its own

    def check(self) -> None:
        pass

    def write(self, program: Any, path: Path) -> None:
        for file in self.files(path):
            file.write_text(program)

    def load(self, path: Path, **options: Any) -> Any:
        written = path.read_text()

        def run(call: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            self.ran.append((written, len(call["pixel_values"])))
            return [call["pixel_values"].sum((2, 3))]

        return run


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``write_artifact`` of a model, with words for programs."""
    asked: dict[str, Any] = {}
    small = make_vit(num_hidden_layers=1)

    def noting(name: str, made: Any) -> Callable[..., Any]:
        return lambda *_, **options: (asked.update({name: options}), made)[1]

    merged = lambda pixel_values: pixel_values.sum((2, 3))  # noqa: E731
    monkeypatch.setattr(artifacts, "export", noting("export", "merged"))
    monkeypatch.setattr(artifacts, "export_unmerged", noting("export_unmerged", "unmerged"))
    monkeypatch.setattr(artifacts, "apply", noting("apply", merged))
    monkeypatch.setattr(Noted, "ran", [])

    def write(
        to: str,
        path: Path,
        kind: type[Door] = Noted,
        model: Any = small,
        **options: Any,
    ) -> Any:
        monkeypatch.setitem(DOORS, to, kind(**vars(DOORS[to])))
        given = {name: options.pop(name) for name in ("force", "progress") if name in options}
        asked["made"] = write_artifact(model, ToMe(8), to, path, Writing(**options), **given)
        return asked

    return write


def test_the_speed_is_the_unmerged_files_over_the_merged_ones(
    faked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def medians(functions: Any, *_: Any, **__: Any) -> tuple[float, float]:
        Noted.ran.clear()
        for function in functions:
            function()
        timed.extend(Noted.ran)
        return 3.0, 2.0

    monkeypatch.setattr(artifacts, "medians_in_turns", medians)
    asked = faked("pt2", tmp_path / "vit.pt2", batch=4)
    assert timed == [("unmerged", 4), ("merged", 4)]
    assert asked["export_unmerged"].items() <= asked["export"].items()
    made = asked["made"]
    assert made.speedup == 1.5
    assert "batch 4: 3.0 ms unmerged, 2.0 ms merged, 1.50x" in str(made.table().caption)
    assert [p.name for p in tmp_path.iterdir()] == ["vit.pt2"]


def test_outputs_go_to_the_file_and_to_what_it_is_held_against(faked: Any, tmp_path: Path) -> None:
    asked = faked("pt2", tmp_path / "vit.pt2", timed=False, outputs="merged")
    assert asked["export"]["outputs"] == asked["apply"]["outputs"] == "merged"


@pytest.mark.parametrize(
    ("to", "name", "beside", "foreign"),
    [
        ("openvino", "vit.xml", "vit.bin", "vit.xml.data"),
        ("onnx", "vit.onnx", "vit.onnx.data", "vit.bin"),
    ],
)
def test_a_format_of_two_files(
    to: str, name: str, beside: str, foreign: str, faked: Any, tmp_path: Path
) -> None:
    """The second is guarded and moved like the first; that of another format is nobody's."""
    out = tmp_path / name
    (tmp_path / foreign).write_text("other")
    faked(to, out, timed=False)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        name: "merged",
        beside: "merged",
        foreign: "other",
    }
    out.unlink()
    with pytest.raises(TomeError, match=f"'{beside}' exists"):
        check_path(out, DOORS[to], force=False)


def test_the_second_file_of_what_was_there_goes_away(faked: Any, tmp_path: Path) -> None:
    class Alone(Noted):
        def write(self, program: Any, path: Path) -> None:
            path.write_text(program)

    (tmp_path / "vit.onnx.data").write_text("stale")
    faked("onnx", tmp_path / "vit.onnx", Alone, timed=False, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["vit.onnx"]


def test_force_replaces(exported: Any, stand_in: Any, tmp_path: Path) -> None:
    out = tmp_path / "vit.pt2"
    out.write_text("old")
    with pytest.raises(TomeError, match="--force"):
        write_artifact(exported.model, ToMe(8), "pt2", out, Writing(timed=False))
    assert out.read_text() == "old"
    write_artifact(exported.model, ToMe(8), "pt2", out, Writing(timed=False), force=True)
    assert out.stat().st_size > 1000


class Halfway(Noted):
    """Breaks off in the middle of a file."""

    def write(self, program: Any, path: Path) -> None:
        super().write("half", path)
        raise OSError("disk full")


class Fails(Noted):
    """Raises what its runtime made up, in many lines, when it runs."""

    def load(self, path: Path, **options: Any) -> Any:
        def run(call: Any) -> Any:
            raise KeyError("no kernel\nfor this")

        return run


class Wrong(Noted):
    """Computes something else."""

    def load(self, path: Path, **options: Any) -> Any:
        run = super().load(path)
        return lambda call: [value * 1.01 for value in run(call)]


class Blank(Noted):
    """Computes what is no number, for its second batch."""

    def load(self, path: Path, **options: Any) -> Any:
        run = super().load(path)
        return lambda call: [v * float("nan" if len(v) == 2 else 1) for v in run(call)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Halfway, "OpenVINO failed: OSError: disk full$"),
        (Fails, r"(?s)OpenVINO failed: KeyError: 'no kernel\\nfor this'.*another format"),
        (Wrong, "computes something else"),
        (Blank, "a relative error of nan at batch 2"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_nothing_and_keeps_what_was_there(
    kind: type[Door],
    said: str,
    there: bool,
    faked: Any,
    tmp_path: Path,
) -> None:
    out = tmp_path / "vit.xml"
    if there:
        out.write_text("old")
    with pytest.raises(TomeError, match=said):
        faked("openvino", out, kind, timed=False, force=True)
    assert [p.name for p in tmp_path.iterdir()] == (["vit.xml"] if there else [])
    assert not there or out.read_text() == "old"


@pytest.mark.parametrize("name", ["vit.xml", "vit.bin"])
def test_a_file_that_came_meanwhile_is_not_replaced(name: str, faked: Any, tmp_path: Path) -> None:
    def step(what: str) -> None:
        if what.startswith("writing"):
            (tmp_path / name).write_text("somebody else's")

    with pytest.raises(TomeError, match=f"'{name}' exists"):
        faked("openvino", tmp_path / "vit.xml", timed=False, progress=step)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "somebody else's"}


def test_a_batch_beyond_what_a_format_is_written_for(faked: Any, tmp_path: Path) -> None:
    with pytest.raises(TomeError, match=r"(?s)batches of 1 to 64, got 65.*--dynamic none"):
        faked("tensorrt", tmp_path / "vit.pt2", batch=65)
    faked("tensorrt", tmp_path / "vit.pt2", batch=65, dynamic_batch=False, timed=False)
    assert Noted.ran == [("merged", 65)]


class Near(Noted):
    """Is wrong by a tenth."""

    def load(self, path: Path, **options: Any) -> Any:
        run = super().load(path)
        return lambda call: [value * 1.1 for value in run(call)]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "passes"),
    [
        (torch.float32, None, False),
        (torch.bfloat16, None, True),
        (torch.bfloat16, 0.01, False),
        (torch.float32, 0.2, True),
    ],
)
def test_what_counts_as_the_models_own(
    dtype: torch.dtype, tolerance: float | None, passes: bool, faked: Any, tmp_path: Path
) -> None:
    model = make_vit(num_hidden_layers=1).to(dtype)
    out = tmp_path / "vit.pt2"
    if passes:
        faked("pt2", out, Near, timed=False, tolerance=tolerance, model=model)
    else:
        with pytest.raises(TomeError, match=r"error of (1\.0e-01|9\.9e-02) at batch 1"):
            faked("pt2", out, Near, timed=False, tolerance=tolerance, model=model)
    assert out.exists() is passes


def test_parity_says_what_differs() -> None:
    theirs = torch.eye(3)
    ours = theirs.clone()
    ours[0, 1] = 2.0
    found = parity(lambda call: [ours], lambda **call: theirs, {})  # type: ignore[arg-type]
    assert found == Parity(3, 2.0, pytest.approx(2 / 3**0.5), pytest.approx(2 / 3))
    with pytest.raises(TomeError, match="expected outputs"):
        parity(lambda call: [ours[:1]], lambda **call: theirs, {})  # type: ignore[arg-type]


def test_parity_steps_over_no_output_that_is_not_a_number() -> None:
    ours, theirs = [torch.ones(2, 3), torch.full((2, 3), torch.nan)], [torch.ones(2, 3)] * 2
    found = parity(lambda call: ours, lambda **call: theirs, {})  # type: ignore[arg-type]
    assert found.relative_error != found.relative_error
    assert found.max_error != found.max_error


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--to", "tflite", "-o", "{out}/a.pt2"), "unknown format 'tflite'"),
        (("--to", "onnx", "-o", "{out}/a.pt2"), "files that end with .onnx"),
        (("--to", "pt2", "-o", "{out}/none/a.pt2"), "no such directory"),
        (("--to", "pt2", "-o", "{out}"), "files that end with .pt2"),
        (("--to", "pt2", "-o", "{out}/a.pt2", "--dynamic", "resolution"), "resolution is fixed"),
        (("--to", "pt2", "-o", "{out}/a.pt2", "--plan", "./none.json"), "no such plan"),
        (("--to", "pt2", "-o", "{out}/a.pt2", "--plan", "p.json", "--r", "8"), "not both"),
        (("--to", "pt2", "-o", "{out}/a.pt2", "--r", "many"), "r is a count"),
    ],
)
def test_wrong_input_is_said_and_writes_nothing(
    args: tuple[str, ...], said: str, model_dir: Path, tmp_path: Path
) -> None:
    given = [a.format(out=tmp_path) for a in args]
    printed = _run("--model", str(model_dir), *given, status=2)
    assert said in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_refused_writes_nothing(tmp_path: Path) -> None:
    make_model("swin").save_pretrained(tmp_path / "swin")
    out = tmp_path / "swin.pt2"
    printed = _run("--model", str(tmp_path / "swin"), "--to", "pt2", "-o", str(out), status=2)
    assert "cannot be merged" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["swin"]
