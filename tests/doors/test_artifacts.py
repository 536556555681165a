"""``tomepass export``: a whole, checked file or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from zoo import make_model

from tomepass import ToMe, TomeError, artifacts
from tomepass.artifacts import Parity, parity, write_artifact
from tomepass.cli import app
from tomepass.doors import DOORS, Door


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


def test_the_speed_is_that_of_two_files_of_one_format(
    exported: Any, stand_in: Any, tmp_path: Path
) -> None:
    made = write_artifact(exported.model, ToMe(8), "pt2", tmp_path / "vit.pt2", batch=2)
    assert made.milliseconds is not None
    assert made.speedup == made.milliseconds[0] / made.milliseconds[1]
    assert [p.name for p in tmp_path.iterdir()] == ["vit.pt2"]


def test_force_replaces(exported: Any, stand_in: Any, tmp_path: Path) -> None:
    out = tmp_path / "vit.pt2"
    out.write_text("old")
    with pytest.raises(TomeError, match="--force"):
        write_artifact(exported.model, ToMe(8), "pt2", out, timed=False)
    assert out.read_text() == "old"
    write_artifact(exported.model, ToMe(8), "pt2", out, timed=False, force=True)
    assert out.stat().st_size > 1000


class Halfway(Door):
    """Breaks off in the middle of a file."""

    def write(self, program: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")


class Wrong(Door):
    """Computes something else."""

    def load(self, path: Path, **options: Any) -> Any:
        run = super().load(path)
        return lambda call: [value * 1.01 for value in run(call)]


@pytest.mark.parametrize(("kind", "error"), [(Halfway, OSError), (Wrong, TomeError)])
@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_nothing_and_keeps_what_was_there(
    kind: type[Door],
    error: type[Exception],
    there: bool,
    exported: Any,
    stand_in: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = DOORS["pt2"]
    fields = (form.name, form.suffix, form.module, form.needs, form.extra, form.runtime)
    monkeypatch.setitem(DOORS, "pt2", kind(*fields))
    out = tmp_path / "vit.pt2"
    if there:
        out.write_text("old")
    with pytest.raises(error, match=r"disk full|computes something else"):
        write_artifact(exported.model, ToMe(8), "pt2", out, timed=False, force=True)
    assert [p.name for p in tmp_path.iterdir()] == (["vit.pt2"] if there else [])
    assert not there or out.read_text() == "old"


def test_a_file_that_came_meanwhile_is_not_replaced(
    exported: Any, stand_in: Any, tmp_path: Path
) -> None:
    out = tmp_path / "vit.pt2"

    def step(what: str) -> None:
        if what.startswith("writing"):
            out.write_text("somebody else's")

    with pytest.raises(TomeError, match="exists"):
        write_artifact(exported.model, ToMe(8), "pt2", out, timed=False, progress=step)
    assert out.read_text() == "somebody else's"


def test_parity_says_what_differs() -> None:
    theirs = torch.eye(3)
    ours = theirs.clone()
    ours[0, 1] = 2.0
    found = parity(lambda call: [ours], lambda **call: theirs, {})  # type: ignore[arg-type]
    assert found == Parity(3, 2.0, pytest.approx(2 / 3**0.5), pytest.approx(2 / 3))
    with pytest.raises(TomeError, match="expected outputs"):
        parity(lambda call: [ours[:1]], lambda **call: theirs, {})  # type: ignore[arg-type]
    assert replace(found, max_error=0.0) != found


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
