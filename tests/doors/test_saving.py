"""``merged.save_pretrained`` and ``tomepass.load``, and files they cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import make, pixels
from zoo import make_vit

import tomepass
from tomepass import EViT, ToMe, TomeError
from tomepass.saving import FILE, VERSION, chosen_method, read_settings


def test_a_merged_model_comes_back_as_it_was(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    merged = tomepass.apply(make_vit(num_hidden_layers=1), EViT(keep_rate=0.6, blocks=(0,)))
    merged.save_pretrained(tmp_path)
    loaded = tomepass.load(tmp_path)
    assert loaded.method == merged.method
    assert torch.equal(loaded(x).logits, merged(x).logits)
    assert json.loads((tmp_path / FILE).read_text())["version"] == VERSION
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", FILE}


def test_a_directory_without_settings_is_merged_with_16_and_says_so(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tomepass.load(model_dir).method == ToMe(16)
    assert "no tomepass.json" in capsys.readouterr().err


def test_what_is_asked_for_goes_before_what_was_saved(tmp_path: Path) -> None:
    merged = tomepass.apply(make_vit(num_hidden_layers=1), ToMe(5))
    merged.save_pretrained(tmp_path)
    assert chosen_method(str(tmp_path))[1] == ToMe(5)
    assert chosen_method(str(tmp_path), ToMe(3).schedule)[1] == ToMe(3)


def test_a_module_without_save_pretrained_says_so(tmp_path: Path) -> None:
    merged = tomepass.apply(make(depth=1), r=2, example_inputs=pixels())
    with pytest.raises(TomeError, match="has no save_pretrained"):
        merged.save_pretrained(tmp_path)


GOOD: dict[str, Any] = {"version": VERSION, "method": ToMe(4).to_dict(), "outputs": "original"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no JSON"),
        ("[1]", "expected an object, got list"),
        (json.dumps(GOOD | {"version": 2}), r"(?s)of version 2.*update tomepass"),
        (json.dumps({"method": GOOD["method"]}), "of version None"),
        (json.dumps(GOOD | {"speed": 1}), r"unknown fields \['speed'\]; known: version, method"),
        (json.dumps({"version": VERSION, "method": GOOD["method"]}), "missing: outputs"),
        (json.dumps(GOOD | {"method": {"method": "magic"}}), "unknown method 'magic'"),
        (json.dumps(GOOD | {"method": GOOD["method"] | {"q": 1}}), r"unknown fields \['q'\]"),
        (json.dumps(GOOD | {"method": 3}), "its method is none"),
        (json.dumps(GOOD | {"method": GOOD["method"] | {"r": "x"}}), "its method is none"),
        (json.dumps(GOOD | {"outputs": "short"}), "known: original, merged"),
    ],
)
def test_settings_that_cannot_be_read(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(TomeError, match=said):
        read_settings(tmp_path)


def test_an_archive_is_loaded_as_a_module(exported: Any, archive: Path) -> None:
    x, logits = exported.expected[2]
    assert torch.allclose(tomepass.load(archive)(pixel_values=x)["logits"], logits, atol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "missing"])
def test_an_archive_that_cannot_be_read(damage: str, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.pt2"
    if damage == "cut":
        path.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    elif damage == "foreign":
        torch.save({"a": torch.ones(2)}, path)
    elif damage == "empty":
        path.write_bytes(b"")
    with pytest.raises(TomeError, match=r"no archive|holds no exported program|no such file"):
        tomepass.load(path)
