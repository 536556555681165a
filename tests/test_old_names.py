"""Names that documentation showed once still work, with a warning."""

from __future__ import annotations

import importlib
import sys

import pytest

import tomepass
from tomepass.formats import openvino_ir
from tomepass.methods.block import ReducingBlock

OLD = {
    ("tomepass.methods", "calibrate_tau"): lambda: tomepass.calibrate_tau,
    ("tomepass.doors.openvino_ir", "token_products"): lambda: openvino_ir.token_products,
    ("tomepass.reducing", "Reducing"): lambda: ReducingBlock,
}


@pytest.mark.parametrize("name", OLD, ids=".".join)
def test_an_old_name_is_the_new_one(name: tuple[str, str]) -> None:
    home, attribute = name
    if home != "tomepass.methods":
        sys.modules.pop(home, None)
    with pytest.warns(DeprecationWarning, match=r"is tomepass\.\S+ now"):
        found = getattr(importlib.import_module(home), attribute)
    assert found is OLD[name]()


def test_other_names_of_methods_are_as_unknown_as_before() -> None:
    with pytest.raises(AttributeError, match="no attribute 'calibrate_taus'"):
        tomepass.methods.calibrate_taus  # noqa: B018
