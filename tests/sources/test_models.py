"""Models and images from disk: what is read, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor
from zoo import make_model

from tomepass.cli.options import parse_dtype
from tomepass.errors import TomeError
from tomepass.handover.compiling.inner import default_inner
from tomepass.sources.images import load_images
from tomepass.sources.models import load_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, size in enumerate([(32, 32), (40, 50), (32, 32)]):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_a_saved_model_loads_in_eval_mode_as_its_own_class(model_dir: Path) -> None:
    model = load_model(model_dir)
    assert type(model).__name__ == "ViTForImageClassification"
    assert not model.training


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "no-such-dir", "~/nowhere/x"])
def test_a_path_that_does_not_exist_is_said_to_be_one(name: str) -> None:
    with pytest.raises(TomeError, match="no such model directory"):
        load_model(name)


def test_a_file_is_not_a_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(TomeError, match="is a file"):
        load_model(tmp_path / "model.safetensors")


def test_an_empty_directory_says_what_belongs_in_it(tmp_path: Path) -> None:
    with pytest.raises(TomeError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_hub_id_without_a_network_says_how_to_pass_a_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def no_network(*args: object, **kwargs: object) -> None:
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(TomeError, match="could not be fetched") as caught:
        load_model("nobody/no-such-model")
    assert "save_pretrained(DIR)" in str(caught.value)


def test_images_come_normalised_in_name_order(model_dir: Path, image_dir: Path) -> None:
    model = load_model(model_dir)
    data = load_images(model, model_dir, image_dir)
    assert data.names == ("0.png", "1.png", "2.png")
    assert data.pixel_values.shape == (3, 3, 32, 32)
    assert data.labels is None
    pixels = torch.from_numpy(np.array(Image.open(image_dir / "0.png"))).permute(2, 0, 1)
    torch.testing.assert_close(data.pixel_values[0], pixels / 127.5 - 1, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "text", ["file\tclass\n0.png\t4\n1.png\t5\n2.png\t6\n", "0.png,4\n1.png,5\n2.png,6\n"]
)
def test_labels_are_read_from_tsv_or_csv_with_or_without_heading(
    model_dir: Path, image_dir: Path, tmp_path: Path, text: str
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(text)
    data = load_images(load_model(model_dir), model_dir, image_dir, labels, limit=2)
    assert data.labels is not None
    assert data.labels.tolist() == [4, 5]


def test_a_missing_label_and_a_wrong_one_are_named(
    model_dir: Path, image_dir: Path, tmp_path: Path
) -> None:
    model = load_model(model_dir)
    labels = tmp_path / "labels.csv"
    labels.write_text("0.png,4\n1.png,cat\n")
    with pytest.raises(TomeError, match=r"line 2: expected a class index, got 'cat'"):
        load_images(model, model_dir, image_dir, labels)
    labels.write_text("0.png,4\n")
    with pytest.raises(TomeError, match=r"2 images have no label, the first is '1\.png'"):
        load_images(model, model_dir, image_dir, labels)
    with pytest.raises(TomeError, match="no such labels file"):
        load_images(model, model_dir, image_dir, tmp_path / "none.csv")


def test_an_image_that_does_not_decode_is_named(model_dir: Path, image_dir: Path) -> None:
    (image_dir / "1.png").write_bytes(b"not an image")
    with pytest.raises(TomeError, match=r"image '1\.png' does not decode"):
        load_images(load_model(model_dir), model_dir, image_dir)


def test_a_folder_without_images_is_said(model_dir: Path, tmp_path: Path) -> None:
    model = load_model(model_dir)
    with pytest.raises(TomeError, match="no images in"):
        load_images(model, model_dir, tmp_path)
    with pytest.raises(TomeError, match="no such image folder"):
        load_images(model, model_dir, tmp_path / "none")


def test_a_model_without_image_processor_says_how_to_save_one(
    image_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    make_model("vit").save_pretrained(folder)
    with pytest.raises(TomeError, match=r"processor\.save_pretrained"):
        load_images(load_model(folder), folder, image_dir)


def test_dtypes_are_known_by_their_short_names() -> None:
    assert parse_dtype("bf16") is torch.bfloat16
    assert parse_dtype("fp32") is torch.float32
    with pytest.raises(TomeError, match="known: bf16, fp16, fp32"):
        parse_dtype("int8")


def test_without_a_compiler_the_default_backend_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none_found() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    assert default_inner() == "eager"
    assert default_inner("cuda") == "inductor"
