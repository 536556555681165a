"""What all tests share: tiny models, and a Dynamo that forgets between tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Triton reads this when it is imported, which importing Dynamo does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch._dynamo
from captured import once
from depth import at_hand
from profiles import pytest_configure, pytest_terminal_summary
from zoo import CORE, FAMILIES, installed, make_inputs, make_model

from tomepass.handover import applied

__all__ = [
    "FAMILIES",
    "make_inputs",
    "make_model",
    "pytest_configure",
    "pytest_terminal_summary",
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo compiles a code object eight times at most: the tests must not add up."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


GENERATED = "generated code"
"""Tests that have Inductor generate code share what the C++ compiler made of it."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares captures stays on one worker: a family's tests, else a file's.

    The longest of these come first, which one worker would else be left with at the end.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    first = [GENERATED, "vit"]
    items.sort(key=lambda item: _ahead(item, first))


def _ahead(item: pytest.Item, first: list[str]) -> int:
    group = item.get_closest_marker("xdist_group").args[0]
    return first.index(group) if group in first else len(first)


def _group(item: pytest.Item) -> str:
    if "shared_models" in getattr(item, "fixturenames", ()):
        values = getattr(item, "callspec", None) and item.callspec.params.values()
        family = [v for v in values or () if isinstance(v, str) and v in FAMILIES]
        return family[0] if family else "vit"
    return item.nodeid.partition("::")[0]


def pytest_collection_finish() -> None:
    """What was imported stays: else each full collection walks through all of PyTorch again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # graphs are many small objects that live for a while


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out tests on a GPU where there is none, and interpreted ones where there is one."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _versions(request: pytest.FixtureRequest) -> None:
    """Leaves out a family whose entry in the table needs newer versions than are installed."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in FAMILIES and not installed(FAMILIES[name].needs):
        pytest.skip(f"needs {FAMILIES[name].needs}")


@pytest.fixture(params=at_hand(CORE, ["deit_distilled", "dinov2_registers"]))
def family(request: pytest.FixtureRequest) -> str:
    """Each of the core families in turn, by name: two every time, the others deep."""
    return str(request.param)


@pytest.fixture
def shared_models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One model of each family, captured once, for tests that leave it as it is."""
    monkeypatch.setattr(applied, "capture_module", _capture_once)
    return _MODELS


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """In this file each model is captured once for each kind of call, whatever is made of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(applied, "capture_module", _capture_once)
        yield


_CAPTURE = applied.capture_module


def _capture_once(*args: Any, **options: Any) -> Any:
    return once(_CAPTURE, *args, **options)


@pytest.fixture(params=["graphs run", pytest.param("code generated", marks=pytest.mark.deep)])
def inductor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor, which runs the graphs it is given as they are; deep, it makes code of them."""
    if request.param == "graphs run":
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", _run_as_it_is)


def _run_as_it_is(graph: Any, inputs: Any, **options: Any) -> Any:
    return graph.forward


class _Models(dict[str, Any]):
    """Made when they are asked for."""

    def __missing__(self, name: str) -> Any:
        self[name] = make_model(name)
        return self[name]


_MODELS = _Models()


@pytest.fixture
def vit() -> Any:
    """A fresh ViT classifier."""
    return make_model("vit")


@pytest.fixture
def images() -> torch.Tensor:
    """Two images for it: ``[2, 3, 32, 32]``."""
    return make_inputs("vit")["pixel_values"]
