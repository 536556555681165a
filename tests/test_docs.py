"""The examples in README and docs run as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import make_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_ID = "google/vit-base-patch16-224"


def _blocks(page: Path, language: str = "python") -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, page.read_text(), flags=re.MULTILINE | re.DOTALL)


# What the recipes of a page need beside the package; they take long: make test-doors.
DOORS = {
    "aoti.md": (),
    "onnx.md": ("onnxscript", "onnxruntime"),
    "openvino.md": ("openvino",),
    "quantization.md": ("torchao", "nncf", "openvino"),
}


# Run every time: what all begin with, and a file; the other pages deep.
FIRST = ("README.md", "checking.md")


def _with_recipes() -> list[Any]:
    pages = [page for page in PAGES if _blocks(page)]
    return [pytest.param(page, marks=_marks(page.name), id=page.name) for page in pages]


def _marks(page: str) -> Any:
    if page in DOORS:
        return pytest.mark.doors
    return () if page in FIRST else pytest.mark.deep


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("page", _with_recipes())
def test_python_examples_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in DOORS.get(page.name, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)  # an example may write a file
    make_model("vit").save_pretrained(tmp_path / "model")
    names: dict[str, Any] = {"x": torch.randn(2, 3, 32, 32)}
    for block in _blocks(page):
        code = block.replace(HUB_ID, str(tmp_path / "model"))
        exec(compile(code, page.name, "exec"), names)


def test_the_pages_that_are_linked_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_page_names_a_command_that_does_not_exist() -> None:
    from tomepass.cli.commands import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    for page in PAGES:
        shell = "".join(_blocks(page, "bash"))
        used = set(re.findall(r"^tomepass ([a-z]+)", shell, flags=re.MULTILINE))
        assert used <= known, f"{page.name}: {used - known}"
