"""The demo: the embedded model, its table, its picture, its plot."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from tomepass import digits
from tomepass.cli.demo import run_demo
from tomepass.errors import TomeError
from tomepass.handover.compiling import inner


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured speeds do not matter here, and compiling takes a while."""
    monkeypatch.setattr(inner, "default_inner", lambda device="cpu": "eager")


def _console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_the_embedded_model_reads_digits() -> None:
    pixels, labels = digits.load_images()
    with torch.no_grad():
        found = digits.load_model()(pixels).logits.argmax(-1)
    assert pixels.shape == (360, 1, 32, 32)
    assert (found == labels).float().mean() > 0.96


@pytest.mark.deep
@pytest.mark.usefixtures("eager")
def test_the_demo_prints_three_tables_and_writes_two_pictures(tmp_path: Path) -> None:
    console = _console()
    rows = run_demo(console, r=[2, 6], out=tmp_path, limit=60, batch=8, rounds=1)
    assert [row.r for row in rows] == [0, 2, 6]
    assert [row.tokens for row in rows] == ["65", "65 -> 49", "65 -> 17"]
    assert rows[0].accuracy is not None
    assert rows[0].accuracy > 90
    assert rows[1].agreement > 90
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "All checks pass" in printed
    assert "17 -> 17" not in printed
    assert "No C++ compiler was found" in printed
    for name in ("merged_tokens.png", "accuracy_speed.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400


@pytest.mark.deep
@pytest.mark.usefixtures("eager")
def test_the_demo_takes_a_users_model_and_images(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor
    from zoo import make_model

    folder = tmp_path / "model"
    make_model("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        Image.effect_noise((32, 32), 40 + i).convert("RGB").save(images / f"{i}.png")
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"{i}.png\t{i}\n" for i in range(5)))
    rows = run_demo(
        _console(), str(folder), images, labels, [8], tmp_path / "out", batch=4, rounds=1
    )
    assert [row.r for row in rows] == [0, 8]
    assert all(row.accuracy is not None for row in rows)


def test_a_model_without_images_is_refused() -> None:
    with pytest.raises(TomeError, match="belong together"):
        run_demo(_console(), model_name="somewhere")
