"""A merged module is exported as the model is: by the names of its own inputs, at any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import make, pixels
from torch.export import Dim

import tomepass


@pytest.mark.parametrize("by_name", [False, True])
def test_a_merged_module_is_exported_with_dynamic_shapes_by_name(by_name: bool) -> None:
    merged = tomepass.apply(make(), r=4, example_inputs=pixels())
    args: tuple[Any, ...] = () if by_name else (pixels(),)
    kwargs = {"pixels": pixels()} if by_name else {}
    shapes = {"pixels": {0: Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(merged, args, kwargs, dynamic_shapes=shapes)
        more = pixels(5)
        got = program.module()(pixels=more) if by_name else program.module()(more)
        assert torch.allclose(got, merged(more), atol=1e-6)


@pytest.mark.doors
def test_onnx_takes_a_merged_module_by_name() -> None:
    pytest.importorskip("onnxscript")
    merged = tomepass.apply(make(), r=4, example_inputs=pixels())
    shapes = {"pixels": {0: Dim("batch")}}
    made = torch.onnx.export(merged, (pixels(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert made is not None
    (images,) = made.model.graph.inputs
    assert not isinstance(images.shape[0], int)
