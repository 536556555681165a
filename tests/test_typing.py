"""What a type checker and a user's isinstance see of what `apply` returns."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path

import pytest
from encoders import make, pixels

import tomepass
from tomepass import MergedModel, Refused, ToMe
from tomepass.handover.adaptive import AdaptiveModel
from tomepass.handover.merged import of_one_graph
from tomepass.methods import MethodLike

ROOT = Path(__file__).parent.parent

RIGHT = """
import torch, tomepass
from torch import nn

def use(model: nn.Module, x: torch.Tensor, plan: tomepass.Plan) -> torch.Tensor:
    merged = tomepass.apply(model, r=8)
    merged = tomepass.apply(model, tomepass.ToMe(r=8)).tome.prepare(x).eval()
    report: tomepass.Report = tomepass.apply(model, plan).tome.prepare(x).tome.report(x)
    original: nn.Module = merged.tome.original
    tomepass.explain(model, plan), tomepass.check(model, x, plan, outputs="merged")
    tomepass.export(model, plan)
    return merged.tome.source(x)
"""

# Each line, in place of what `use` does, is refused with that.
WRONG = {
    "merged.nonsense()": "operator",
    "merged.tome.nonsense()": "attr-defined",
    "merged.tome.prepare()": "call-arg",
    "tomepass.apply(model, 8)": "arg-type",
    "tomepass.apply(model, 'tome')": "arg-type",
    "tomepass.explain(model, model)": "arg-type",
    "tomepass.apply(model, outputs='short')": "arg-type",
    "tomepass.check(model, x, outputs='short')": "arg-type",
    "number: int = merged.tome.source(x)": "assignment",
}


def refusals(path: Path) -> list[str]:
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if " error: " in line]


@pytest.mark.deep
def test_a_type_checker_takes_what_is_right_and_refuses_what_is_not(tmp_path: Path) -> None:
    head = "import torch, tomepass\nfrom torch import nn\n\n"
    takes = "(model: nn.Module, merged: tomepass.MergedModel, x: torch.Tensor) -> None:"
    bodies = "".join(f"def wrong_{n}{takes}\n    {line}\n" for n, line in enumerate(WRONG))
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(head + bodies)
    assert refusals(tmp_path / "right.py") == []
    told = refusals(tmp_path / "wrong.py")
    kinds = [f"wrong.py:{5 + 2 * n}: [{kind}]" for n, kind in enumerate(WRONG.values())]
    assert [f"{t.rpartition('/')[2].split(' ')[0]} {t.split()[-1]}" for t in told] == kinds, told


@pytest.fixture(scope="module")
def adaptive() -> MergedModel:
    return tomepass.apply(make(depth=2), ToMe(2, adaptive=True), example_inputs=pixels(6))


def test_what_apply_returns_is_a_merged_model_however_many_graphs_it_has(
    adaptive: MergedModel,
) -> None:
    merged = tomepass.apply(make(depth=2), r=2, example_inputs=pixels())
    assert isinstance(merged, MergedModel)
    assert isinstance(adaptive, MergedModel)
    assert isinstance(adaptive, AdaptiveModel)
    assert (of_one_graph(merged), of_one_graph(adaptive), of_one_graph(make())) == (1, 0, 0)


OF_ONE = ("source", "kept", "kept_report", "report", "captured")


@pytest.mark.parametrize("name", OF_ONE)
def test_several_graphs_answer_nothing_that_is_about_one(adaptive: MergedModel, name: str) -> None:
    with pytest.raises(Refused, match=r"routes images to several graphs, and .* is of one"):
        getattr(adaptive.tome, name)(pixels(3))


@pytest.mark.parametrize(
    "entry",
    [
        lambda model: tomepass.apply(model, r=2),
        lambda model: tomepass.explain(model, example_inputs=pixels()),
        lambda model: tomepass.check(model, pixels()),
        lambda model: tomepass.plan(model, pixels(), r=2, inner="eager", progress=False),
        lambda model: tomepass.calibrate(model, [pixels()], macs=0.9, progress=False),
    ],
)
def test_every_entry_refuses_several_graphs_where_it_is_about_one(
    adaptive: MergedModel, entry: typing.Callable[[object], object]
) -> None:
    with pytest.raises(Refused, match="routes images to"):
        entry(adaptive)


@pytest.mark.parametrize("entry", ["apply", "explain", "check", "export"])
def test_what_is_taken_as_a_method_is_written_down(entry: str) -> None:
    hints = typing.get_type_hints(getattr(tomepass, entry))
    assert hints["method"] == MethodLike | None
    assert entry != "apply" or hints["return"] is MergedModel
