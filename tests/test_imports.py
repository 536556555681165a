"""Importing is light, and neither importing nor using the package changes a global setting."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from encoders import make, pixels

import tomepass

HEAVY = (
    "torch",
    "transformers",
    "matplotlib",
    "networkx",
    "numpy",
    "PIL",
    "rich",
    "typer",
    "sklearn",
)
LIGHT_USE = {
    "import tomepass": "import tomepass",
    "a method": "import tomepass; tomepass.ToMe((8, -1)).to_json(); tomepass.ToMe(8).counts(12)",
    "the error": "from tomepass import TomeError; str(TomeError('no', block=1))",
    "a look around": "import tomepass; dir(tomepass); tomepass.__version__; tomepass.__all__",
}


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("use", LIGHT_USE)
def test_light_uses_load_nothing_heavy(use: str) -> None:
    loaded = f"import sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(f"{LIGHT_USE[use]}; {loaded}") == "[]"


@pytest.mark.deep
def test_a_public_name_loads_what_it_needs() -> None:
    code = "import sys, tomepass; tomepass.apply; print('torch' in sys.modules)"
    assert run(code) == "True"


@pytest.mark.deep
def test_the_backend_does_not_load_what_only_pictures_and_models_need() -> None:
    code = "import sys, tomepass; tomepass.tome_backend, tomepass.apply, tomepass.check; "
    unneeded = ("transformers", "matplotlib", "typer", "sklearn")
    assert run(f"{code}print([m for m in {unneeded} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("name", tomepass.__all__)
def test_every_public_name_resolves_and_stays_the_same(name: str) -> None:
    value = getattr(tomepass, name)
    assert value is getattr(tomepass, name)
    assert value.__doc__
    module = sys.modules[f"tomepass.{tomepass._HOME[name]}"]
    assert getattr(module, name) is value


def test_dir_lists_the_public_names_alone() -> None:
    assert dir(tomepass) == sorted([*tomepass.__all__, "__version__"])
    assert set(tomepass._HOME) == set(tomepass.__all__)


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from tomepass import *", names)
    assert set(tomepass.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error_that_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'tomepass' has no attribute 'aply'"):
        tomepass.aply  # noqa: B018
    with pytest.raises(ImportError, match="aply"):
        from tomepass import aply  # noqa: F401


# Global settings


def settings() -> dict[str, Any]:
    """What a library must leave as it found it."""
    configs = {
        module.__name__: module.get_config_copy()
        for module in (torch._dynamo.config, torch._inductor.config, torch._functorch.config)
    }
    return {
        **configs,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sdpa": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cudnn.enabled,
            torch.backends.mkldnn.enabled,
        ),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "numpy errors": np.geterr(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
    }


@pytest.mark.deep
def test_the_pass_changes_no_global_setting() -> None:
    model, x = make(depth=1), pixels()
    no_encoder, no_images = torch.nn.Linear(3, 3), torch.ones(2, 3)
    backend = tomepass.TomeBackend(tomepass.ToMe(r=2), inner="aot_eager")

    def refuse() -> None:
        with pytest.raises(tomepass.TomeError):
            tomepass.apply(no_encoder, r=2, example_inputs=no_images)

    actions: dict[str, Callable[[], object]] = {
        "apply": lambda: tomepass.apply(model, r=2)(x),
        "explain": lambda: str(tomepass.explain(model, r=2, example_inputs=x)),
        "refuse": refuse,
        "compile": lambda: torch.compile(model, backend=backend)(x),
        "check": lambda: str(tomepass.check(model, x, r=2, inner="aot_eager")),
    }
    torch.compile(model, backend="aot_eager")(x)  # what torch sets lazily is set now
    for name, action in actions.items():
        torch._dynamo.reset()
        before = settings()
        action()
        after = settings()
        assert [(name, s) for s in before if before[s] != after[s]] == []
