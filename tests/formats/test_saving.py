"""``merged.save_pretrained`` and ``tomepass.load``, and files they cannot read."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import make, pixels
from zoo import make_vit

import tomepass
from tomepass import DynamicViT, EViT, Policy, ToMe, TomeError
from tomepass.cli.chosen import chosen_method
from tomepass.handover.adaptive import AdaptiveModel
from tomepass.handover.merged import MergedModel
from tomepass.handover.standing_in.settings import FILE, VERSION, read_settings, save


def test_a_merged_model_comes_back_as_it_was(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    merged = tomepass.apply(make_vit(num_hidden_layers=1), EViT(keep_rate=0.6, blocks=(0,)))
    merged.save_pretrained(tmp_path)
    loaded = tomepass.load(tmp_path)
    assert loaded.method == merged.method
    assert torch.equal(loaded(x).logits, merged(x).logits)
    assert json.loads((tmp_path / FILE).read_text())["version"] == VERSION
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", FILE}


@pytest.mark.deep
def test_an_adaptive_model_comes_back_with_its_thresholds(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 32, 32)
    method = ToMe(4, adaptive=True)
    merged = tomepass.apply(make_vit(num_hidden_layers=1), method, example_inputs=x)
    merged.save_pretrained(tmp_path)
    loaded = tomepass.load(tmp_path)
    assert loaded.method == merged.method
    assert torch.equal(loaded.routes(x), merged.routes(x))
    # Not to the bit: products of small groups round by where their weights lie in memory.
    torch.testing.assert_close(loaded(x).logits, merged(x).logits)


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


def _damaged_policy() -> dict[str, Any]:
    method = DynamicViT(keep_rate=0.5, policy=Policy({1: {"a": torch.ones(3)}})).to_dict()
    method["policy"]["safetensors"] = method["policy"]["safetensors"][:12]
    return method


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
        (json.dumps(GOOD | {"method": _damaged_policy()}), "no weights of a policy"),
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


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def _in_a_weight(data: bytes) -> int:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        held = [entry for entry in archive.infolist() if "/weights/weight_" in entry.filename]
    largest = max(held, key=lambda entry: entry.file_size)
    return largest.header_offset + largest.file_size // 2


def _zip_of(name: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(name, "")
    return held.getvalue()


def _foreign() -> bytes:
    held = io.BytesIO()
    torch.save({"a": torch.ones(2)}, held)
    return held.getvalue()


@pytest.mark.parametrize(
    ("made_of", "said"),
    [
        (lambda good: b"", "'bad.pt2' is empty"),
        (lambda good: b"hello", "'bad.pt2' is no archive"),
        (lambda good: good[: len(good) // 2], "'bad.pt2' is cut off"),
        (lambda good: _foreign(), "an archive without an exported program"),
        (lambda good: _zip_of("x/data/aotinductor/m"), "is a package of AOTInductor"),
        (
            lambda good: _zip_of("x/models/model.json"),
            r"holds a program that PyTorch .* cannot load",
        ),
        (lambda good: _flipped(good, _in_a_weight(good)), r"is damaged: '.*/weight_\d+'"),
        (lambda good: _flipped(good, good.rindex(b"PK\1\2")), "is damaged: Bad magic number"),
    ],
    ids=["empty", "text", "cut", "foreign", "aoti", "hollow", "weight", "directory"],
)
def test_an_archive_that_cannot_be_read(
    made_of: Any, said: str, archive: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(made_of(archive.read_bytes()))
    with pytest.raises(TomeError, match=said):
        tomepass.load(path)


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TomeError, match="no such file"):
        tomepass.load(tmp_path / "none.pt2")


def test_what_is_no_program_is_not_left_to_pytorch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which logs a traceback before it raises."""
    (tmp_path / "bad.pt2").write_bytes(_foreign())
    with caplog.at_level("WARNING"), pytest.raises(TomeError):
        tomepass.load(tmp_path / "bad.pt2")
    assert not caplog.records


def test_an_archive_takes_no_options(archive: Path) -> None:
    with pytest.raises(TypeError, match="takes no options, got outputs"):
        tomepass.load(archive, outputs="merged")


def test_a_directory_in_ones_home_is_found(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"version": VERSION, "method": ToMe(5).to_dict(), "outputs": "original"}
    home = Path(shutil.copytree(model_dir, tmp_path / "vit_r5")).parent
    (home / "vit_r5" / FILE).write_text(json.dumps(settings))
    monkeypatch.setenv("HOME", str(home))
    assert chosen_method("~/vit_r5")[1] == ToMe(5)


def test_a_directory_that_is_not_there_is_not_merged_with_16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TomeError, match="no such model directory"):
        tomepass.load(tmp_path / "typo")
    assert capsys.readouterr().err == ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for a hub with one model: what its files are, or the errors they give."""
    import huggingface_hub

    files: dict[str, Any] = {}

    def download(repo: str, name: str) -> str:
        assert repo == "owner/vit"
        if isinstance(found := files[name], Exception):
            raise found
        return str(found)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files


def test_settings_are_fetched_from_the_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    hub[FILE] = tmp_path / FILE
    hub[FILE].write_text(json.dumps(GOOD))
    assert read_settings("owner/vit") == (ToMe(4), "original")
    hub[FILE] = EntryNotFoundError("404")
    assert read_settings("owner/vit") is None
    hub[FILE] = LocalEntryNotFoundError("no network")
    with pytest.raises(TomeError, match=r"(?s)cannot be found out: no network.*--r 16"):
        read_settings("owner/vit")


@pytest.mark.parametrize("kind", [MergedModel, AdaptiveModel])
def test_a_merged_model_is_not_pushed_without_its_method(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(TomeError, match=r"(?s)not pushed to the hub.*hf upload"):
        kind.push_to_hub(None, "owner/vit")  # asks nothing of the model
    with pytest.raises(TomeError, match="not pushed to the hub"):
        save(make_vit(), ToMe(2), "original", tmp_path / "vit", push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_directory_to_save_in(tmp_path: Path) -> None:
    (tmp_path / "vit").write_text("")
    with pytest.raises(TomeError, match="is a file; expected a directory"):
        save(make_vit(), ToMe(2), "original", tmp_path / "vit")


def test_settings_that_cannot_be_written_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        save(make_vit(), ToMe(2), "original", tmp_path)
    assert not [p.name for p in tmp_path.iterdir() if FILE in p.name]


def test_what_is_returned_comes_back_too_unless_asked_for_otherwise(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    merged = tomepass.apply(make_vit(num_hidden_layers=1).vit, ToMe([5]), outputs="merged")
    merged.save_pretrained(tmp_path)
    for options, tokens in (({}, 60), ({"outputs": "original"}, 65)):
        loaded = tomepass.load(tmp_path, **options)
        assert loaded(x).last_hidden_state.shape[1] == tokens
        if not options:
            assert torch.equal(loaded(x).last_hidden_state, merged(x).last_hidden_state)
