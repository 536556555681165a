"""HuggingFace's image-classification pipeline takes a merged model for the model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.utils import logging as hf_logging
from zoo import make_model

import tomepass


@pytest.fixture(scope="module")
def processor() -> Any:
    # The one for pillow, which had the plain name once: torchvision is not needed.
    plain = "ViTImageProcessor"
    name = f"{plain}Pil" if hasattr(transformers, f"{plain}Pil") else plain
    return getattr(transformers, name)(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def classify(model: Any, processor: Any, images: Any, **options: Any) -> Any:
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)
    return pipe(images, **options)


def test_a_pipeline_takes_pil_images_and_file_paths(
    processor: Any, image: Image.Image, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = make_model("vit"), tmp_path / "image.png"
    image.save(path)
    expected = classify(model, processor, image, top_k=3)
    whole, merged = tomepass.apply(model, r=0), tomepass.apply(model, r=8)
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        hf_logging.set_verbosity_info()
        assert classify(whole, processor, image, top_k=3) == expected
        assert classify(whole, processor, str(path), top_k=3) == expected
        fewer = classify(merged, processor, image, top_k=3)
        assert classify(merged, processor, str(path), top_k=3) == fewer
        batched = classify(merged, processor, [image, str(path)], batch_size=2, top_k=3)
    finally:
        hf_logging.set_verbosity_warning()
        root.removeHandler(caplog.handler)
    # A pipeline logs an error for a class it does not know.
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], caplog.text
    assert "not supported" not in caplog.text
    assert fewer != expected
    for result in batched:
        assert [p["label"] for p in result] == [p["label"] for p in fewer]
        assert [p["score"] for p in result] == pytest.approx([p["score"] for p in fewer], rel=1e-4)
