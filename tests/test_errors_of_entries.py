"""Errors of every entry, over the zoo, near misses, generated encoders and odd arguments.

Each works, or raises a TomeError with its cause, or an error about an argument; what the user's own
iterable or callback raises comes through as it is. None blames tomepass for what it was given.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from depth import at_hand, in_turn
from encoders import Encoder, make, pixels
from generated import Kind, Spelling, build, kinds, spellings
from hypothesis import given
from near_misses import NEAR_MISSES, near_miss
from profiles import examples
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from zoo import FAMILIES, REFUSED, make_inputs

import tomepass
from tomepass import Prune, ToMe, TomeBackend, TomeError
from tomepass.measuring import measure as benchmarking
from tomepass.model.unmerged import in_precision
from tomepass.proof.replay import relative_error

Entry = Callable[[nn.Module, Any], Any]
IMAGES = pixels(8)


def _compiled(model: nn.Module, inputs: Any) -> Any:
    torch._dynamo.reset()
    call = inputs if isinstance(inputs, dict) else {"pixels": inputs}
    return torch.compile(model, backend=TomeBackend(ToMe(4), inner="eager"))(**call)


def _planned(model: nn.Module, inputs: Any, **changes: Any) -> Any:
    options: dict[str, Any] = {"r": 4, "inner": "eager", "rounds": 1, "progress": False}
    return tomepass.plan(model, inputs, **options | changes)


def _calibrated(model: nn.Module, batches: Any, **changes: Any) -> Any:
    options: dict[str, Any] = {"macs": 0.8, "methods": Prune(), "progress": False}
    return tomepass.calibrate(model, batches, **options | changes)


def _checked(model: nn.Module, inputs: Any, **changes: Any) -> Any:
    return tomepass.check(model, inputs, **{"r": 4, "inner": "eager"} | changes)


ENTRIES: dict[str, Entry] = {
    "apply": lambda model, x: tomepass.apply(model, r=4, example_inputs=x),
    "explain": lambda model, x: tomepass.explain(model, r=4, example_inputs=x),
    "check": _checked,
    "backend": _compiled,
    "export": lambda model, x: tomepass.export(model, r=4, example_inputs=x),
    "plan": _planned,
    "calibrate": lambda model, x: _calibrated(model, [x]),
}
READING = [*ENTRIES][:4]
MEASURING = [*ENTRIES][4:]


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarking, "_SAMPLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


def assert_ours(entry: str, model: nn.Module, inputs: Any) -> None:
    """It works, or says what it must."""
    try:
        ENTRIES[entry](model, inputs)
    except Exception as error:
        told: BaseException = error
        if isinstance(error, BackendCompilerFailed):
            told = error.inner_exception
        assert isinstance(told, (TomeError, TypeError, ValueError))
        assert "fault of tomepass" not in str(told)


# ---- whatever the model ----------------------------------------------------------------------


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize(
    ("entry", "name"),
    at_hand(
        [(entry, name) for entry in ENTRIES for name in (*FAMILIES, *REFUSED)],
        [
            *(("apply", "vit"), ("explain", "deit_distilled"), ("explain", "dinov2_registers")),
            *(("explain", "gpt2"), ("backend", "gpt2"), ("export", "gpt2"), ("plan", "gpt2")),
        ],
    ),
)
def test_the_zoo_raises_nothing_else(entry: str, name: str, shared_models: dict[str, Any]) -> None:
    assert_ours(entry, shared_models[name], make_inputs(name, 4))


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    ("entry", "name"),
    at_hand(
        [(entry, name) for entry in ENTRIES for name in NEAR_MISSES],
        [
            *(("explain", "TalkingHeads"), ("backend", "PooledKeys"), ("check", "NullKey")),
            *(("export", "PaddedMask"), ("plan", "KeysReused"), ("calibrate", "Rollout")),
        ],
    ),
)
def test_near_misses_raise_nothing_else(entry: str, name: str) -> None:
    assert_ours(entry, near_miss(name), IMAGES[:4])


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("entry", at_hand(READING, ["explain", "backend"]))
def test_generated_encoders_raise_nothing_else(entry: str) -> None:
    @examples(2)
    @given(kind=kinds(), spelling=spellings())
    def holds(kind: Kind, spelling: Spelling) -> None:
        assert_ours(entry, build(kind, spelling), IMAGES[:2])

    holds()


# ---- whatever the inputs ---------------------------------------------------------------------

ODD: dict[str, Any] = {
    "number": 3,
    "None": None,
    "text": "abc",
    "NumPy": IMAGES.numpy(),
    "NumPy by name": {"pixels": IMAGES.numpy()},
    "generator": iter([IMAGES]),
    "nothing by name": {"pixels": None},
    "another name": {"images": IMAGES},
    "too many": (IMAGES, IMAGES),
    "empty": (),
    "0-d": torch.tensor(1.0),
    "no images": IMAGES[:0],
    "on the meta device": IMAGES.to("meta"),
    "NaN": IMAGES * float("nan"),
    "half": IMAGES.half(),
    "integers": IMAGES.long(),
    "channels": torch.ones(4, 4, 24, 24),
    "unbatched": IMAGES[0],
    "sparse": IMAGES.to_sparse(),
}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(("entry", "odd"), in_turn(["check", "plan", "calibrate"], ODD))
def test_odd_inputs_are_told(entry: str, odd: str, model: Any) -> None:
    if (entry, odd) == ("plan", "NaN"):
        return  # speed does not depend on values
    with pytest.raises((TomeError, TypeError)) as caught:
        ENTRIES[entry](model, ODD[odd])
    assert "fault of tomepass" not in str(caught.value)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("entry", ["check", "plan", "calibrate"])
def test_inputs_without_values_are_told_where_something_is_computed(entry: str, model: Any) -> None:
    with pytest.raises(TomeError, match="some of the inputs have shapes alone"):
        ENTRIES[entry](model, IMAGES.to("meta"))
    with pytest.raises(TomeError, match=r"parameters .*shapes alone"):
        ENTRIES[entry](make().to("meta"), IMAGES)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("entry", ["check", "calibrate"])
def test_a_model_that_answers_with_nan_is_told_and_not_compared(entry: str, model: Any) -> None:
    with pytest.raises(TomeError, match=r"itself returns (NaN|values that are not)"):
        ENTRIES[entry](model, IMAGES * float("nan"))


def test_an_error_of_nan_is_above_any_tolerance() -> None:
    value = torch.ones(2)
    assert relative_error(value * float("nan"), value) == float("inf")
    assert relative_error(value, value * float("nan")) == float("inf")


# ---- whatever kind of module -----------------------------------------------------------------


class BuiltIn(nn.Module):
    """Its forward is no Python function."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = torch.relu


class Lazy(Encoder):
    """Has parameters that are made by the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(4)


class Around(nn.Module):
    """A part of it is compiled already."""

    def __init__(self, compile_part: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.part = compile_part(make())

    def forward(self, pixels: Tensor) -> Any:
        return self.part(pixels)


class Locked(Encoder):
    """Cannot be copied."""

    def __init__(self, *args: Any, **choices: Any) -> None:
        super().__init__(*args, **choices)
        self.lock = threading.Lock()


MODULES: dict[str, tuple[Callable[[], Any], str]] = {
    "traced": (lambda: torch.jit.trace(make(), IMAGES), "compiled by TorchScript"),
    "scripted": (lambda: torch.jit.script(nn.Linear(2, 2)), "compiled by TorchScript"),
    "built in": (lambda: BuiltIn().eval(), "inputs of BuiltIn.forward cannot be told"),
    "lazy": (lambda: Lazy().eval(), "lazy is a lazy module"),
    "compiled": (lambda: torch.compile(make()), "already compiled"),
    "a class": (lambda: Encoder, "must be a torch.nn.Module"),
    "a name": (lambda: "vit", "must be a torch.nn.Module"),
}


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry != "backend"])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_that_nothing_can_be_read_of_are_told(kind: str, entry: str) -> None:
    build_module, words = MODULES[kind]
    with pytest.raises((TomeError, TypeError), match=words) as caught:
        ENTRIES[entry](build_module(), IMAGES)
    assert "fault of tomepass" not in str(caught.value)


@pytest.mark.deep
def test_what_cannot_be_copied_is_checked_in_low_precision_and_left_as_it_is() -> None:
    model = make(Locked).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = _checked(model, IMAGES[:2].bfloat16())
    assert "replayed: distance from float64" in str(report)
    for name, value in model.state_dict().items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, before[name])


def test_another_precision_keeps_what_is_shared_and_leaves_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    exact = in_precision(model, torch.float64)
    assert exact[0].weight is exact[1].weight
    assert not exact[0].weight.requires_grad
    assert exact[1].bias.requires_grad
    kinds_of = [value.dtype for value in exact[2].buffers()]
    assert kinds_of == [torch.float64, torch.float64, torch.int64]
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@torch.no_grad()
def test_a_merged_model_of_a_compiled_part_is_compiled() -> None:
    model = Around(lambda part: torch.compile(part, backend="eager")).eval()
    merged = tomepass.apply(model, r=4, example_inputs=IMAGES)
    compiled = torch.compile(merged, backend="eager", fullgraph=True)
    assert relative_error(compiled(IMAGES), merged(IMAGES)) < 1e-5
    assert relative_error(merged(IMAGES), model(IMAGES)) > 1e-3


def test_a_merged_model_that_the_backend_cannot_compile_is_told() -> None:
    model = Around(lambda part: torch.jit.trace(part, IMAGES)).eval()
    with pytest.raises(TomeError, match="have the backend 'eager' compile the merged") as caught:
        _checked(model, IMAGES)
    assert "compile the model itself with that backend in one graph first" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("size", ["wide", {"height": 24}, [24], (24, 24, 24), None, 0, -1])
def test_sizes_that_a_config_writes_in_a_way_of_its_own_are_not_guessed(size: Any) -> None:
    model = make()
    model.main_input_name = "pixel_values"
    model.config = SimpleNamespace(image_size=size, num_channels=3)
    with pytest.raises(TomeError, match="cannot be read off its config"):
        tomepass.explain(model, r=4)
    tomepass.apply(model, r=4)  # captured when it is called


# ---- what the user's own code raises ---------------------------------------------------------


class Own(Exception):
    """What a user's code raises."""


class FailsLater(Encoder):
    """Works while it is captured, and fails when it is called."""

    def forward(self, pixels: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            raise Own("no idea")
        return super().forward(pixels)


class FailsCompiled(Encoder):
    """Works when it is called or captured, and fails when Dynamo compiles it."""

    def forward(self, pixels: Tensor) -> Any:
        if torch.compiler.is_dynamo_compiling():
            torch._assert_async(pixels.new_zeros(3) @ pixels.new_zeros(4), "no")
        return super().forward(pixels)


class Positional(Encoder):
    """Takes its images by position alone."""

    def forward(self, *images: Tensor) -> Any:
        return super().forward(images[0])


@pytest.mark.parametrize(
    ("entry", "cls", "cause"),
    [
        ("check", FailsLater, "Own: no idea"),
        ("calibrate", FailsLater, "Own: no idea"),
        ("plan", FailsCompiled, "compiled by the backend 'eager'"),
    ],
)
def test_what_the_model_itself_raises_is_told_as_the_models(
    entry: str, cls: type[Encoder], cause: str
) -> None:
    with pytest.raises(TomeError, match=f"{cls.__name__} itself .*nothing merged") as caught:
        ENTRIES[entry](make(cls), IMAGES)
    assert cause in str(caught.value)
    assert "float32[8, 3, 24, 24]" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert "fault of tomepass" not in str(caught.value)


def test_memory_that_runs_out_in_the_model_is_told_as_such() -> None:
    class Full(FailsLater):
        def forward(self, pixels: Tensor) -> Any:
            try:
                return super().forward(pixels)
            except Own:
                raise torch.OutOfMemoryError("full") from None

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        _calibrated(make(Full), [IMAGES])


def test_a_model_called_by_position_alone_is_checked() -> None:
    assert _checked(make(Positional), (IMAGES,)).ok


def _breaking(values: list[Any]) -> Iterator[Any]:
    yield from values
    raise Own("the loader broke")


class _Loader:
    def __iter__(self) -> Iterator[Any]:
        raise Own("the loader broke")


BREAKING: dict[str, Callable[[], Any]] = {
    "at once": lambda: _breaking([]),
    "later": lambda: _breaking([IMAGES[:4]]),
    "when it is asked for its batches": _Loader,
    "in a DataLoader": lambda: torch.utils.data.DataLoader(_Broken()),
}


class _Broken(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> Tensor:
        raise Own("the loader broke")


@pytest.mark.parametrize("when", BREAKING)
def test_what_the_users_iterable_raises_comes_through_as_it_is(when: str, model: Any) -> None:
    with pytest.raises(Own, match="the loader broke"):
        _calibrated(model, BREAKING[when]())
    with pytest.raises(Own, match="the loader broke"):
        _calibrated(model, [IMAGES], methods=BREAKING[when]())


@pytest.mark.usefixtures("captured_once")
def test_what_a_callback_raises_comes_through_as_it_is(model: Any) -> None:
    def progress(line: str) -> None:
        raise Own(line)

    with pytest.raises(Own):
        _checked(model, IMAGES, progress=progress)


# ---- batches ---------------------------------------------------------------------------------

A, B = IMAGES.split(4)
NEVER: Iterator[Any] = iter(())
UNLIKE = "expected batches alike"
BATCHES: dict[str, tuple[Any, str]] = {
    "none": ([], "there are no images"),
    "consumed": (NEVER, "there are no images"),
    "no iterable": (3, "batches must be an iterable"),
    "nothing": (None, "batches must be an iterable"),
    "one tensor": (IMAGES, r"give \[batch\]"),
    "one call": ({"pixels": IMAGES}, r"give \[batch\]"),
    "text": ("abc", r"give \[batch\]"),
    "another resolution": ([A, torch.ones(4, 3, 28, 28)], UNLIKE),
    "another dtype": ([A, B.double()], UNLIKE),
    "another device": ([A, B.to("meta")], "have shapes alone"),
    "other channels": ([A, B[:, :2]], UNLIKE),
    "another rank": ([A, B[0]], UNLIKE),
    "another name": ([A, {"images": B}], UNLIKE),
    "nothing inside": ([A, None], "inputs must be a tensor"),
    "NumPy inside": ([A, B.numpy()], "inputs must be a tensor"),
    "an empty call": ([A, {}], UNLIKE),
    "no images at first": ([A[:0], B], "batch 0 holds no images"),
    "no images later": ([A, B[:0]], "batch 1 holds no images"),
    "NaN later": ([A, B * float("nan")], "not finite"),
    "labels beside": ([(A, torch.zeros(4))], "at most 1 positional"),
    "too few": ([A[:2]], "too few"),
}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("kind", BATCHES)
def test_odd_batches_are_told_by_calibrate(kind: str, model: Any) -> None:
    batches, words = BATCHES[kind]
    with pytest.raises((TomeError, TypeError), match=words) as caught:
        _calibrated(model, batches)
    assert "fault of tomepass" not in str(caught.value)


class FixedBatch(Encoder):
    """Cannot be captured for any batch size."""

    def forward(self, pixels: Tensor) -> Any:
        return super().forward(torch.stack([pixels[i] for i in range(len(pixels))]))


def test_a_last_batch_that_is_shorter_is_told_where_the_size_is_fixed() -> None:
    with pytest.raises(TomeError, match=r"of one length.*fixed batch size"):
        _calibrated(make(FixedBatch), [IMAGES[:5], IMAGES[5:]])


@pytest.mark.usefixtures("captured_once")
def test_batches_may_come_in_any_form_and_length(model: Any) -> None:
    batches = iter([A, {"pixels": B[:1]}, (B[1:],)])
    assert _calibrated(model, batches, macs=1.0).calibration.held_out.images == 2


class OneRow(Encoder):
    def forward(self, pixels: Tensor) -> Any:
        return super().forward(pixels).mean(0, keepdim=True)


def test_an_answer_that_is_no_row_an_image_is_told() -> None:
    with pytest.raises(TomeError, match=r"expected a row an image .* got \[1, "):
        _calibrated(make(OneRow), [IMAGES])


# ---- other arguments -------------------------------------------------------------------------

Wrong = tuple[str, dict[str, Any], type[Exception], str]
WRONG: list[Wrong] = [
    ("plan", {"rounds": None}, TypeError, "rounds"),
    ("plan", {"rounds": 1.5}, TypeError, "rounds"),
    ("plan", {"rounds": 0}, ValueError, "rounds"),
    ("plan", {"inner": None}, TypeError, "inner"),
    ("plan", {"inner": "bad"}, TomeError, "knows no backend"),
    ("plan", {"inner_options": [1]}, TypeError, "inner_options"),
    ("plan", {"inner_options": {1: 2}}, TypeError, "inner_options"),
    ("plan", {"r": "x"}, TypeError, "r counts"),
    ("plan", {"macs": 0.5}, TypeError, "give one of"),
    ("check", {"inner": 3}, TypeError, "inner"),
    ("check", {"inner": "bad"}, TomeError, "knows no backend"),
    ("check", {"inner_options": "ab"}, TypeError, "inner_options"),
    ("check", {"progress": "x"}, TypeError, "progress"),
    ("check", {"outputs": []}, ValueError, "outputs"),
    ("export", {"outputs": []}, ValueError, "outputs"),
    ("export", {"outputs": ""}, ValueError, "outputs"),
    ("export", {"dynamic_batch": None}, TomeError, "dynamic_batch"),
    ("calibrate", {"macs": None}, TypeError, "give the goal"),
    ("calibrate", {"macs": np.ones(2)}, TypeError, "macs"),
    ("calibrate", {"held_out": "a"}, TypeError, "held_out"),
    ("calibrate", {"held_out": None}, TypeError, "held_out"),
    ("calibrate", {"held_out": float("nan")}, ValueError, "held_out"),
    ("calibrate", {"seed": None}, TypeError, "seed"),
    ("calibrate", {"seed": 1.5}, TypeError, "seed"),
    ("calibrate", {"seed": 1 << 64}, ValueError, "seed"),
    ("calibrate", {"methods": 3}, TypeError, "methods"),
    ("calibrate", {"methods": [None]}, TypeError, "methods"),
    ("calibrate", {"macs": None, "speedup": 2, "inner": "bad"}, TomeError, "knows no backend"),
    ("calibrate", {"macs": None, "speedup": 2, "inner": 3}, TypeError, "inner"),
    ("calibrate", {"macs": None, "speedup": 2, "inner_options": 3}, TypeError, "inner_options"),
    ("calibrate", {"cache": 3}, TypeError, "cache"),
    ("calibrate", {"cache": b"name"}, TypeError, "cache"),
]
CALLS: dict[str, Callable[..., Any]] = {
    "plan": _planned,
    "check": _checked,
    "export": lambda model, x, **more: tomepass.export(model, r=4, example_inputs=x, **more),
    "calibrate": lambda model, x, **more: _calibrated(model, [x], **more),
}


@pytest.mark.parametrize(
    ("entry", "arguments", "kind", "words"), WRONG, ids=[f"{w[0]} {w[1]}" for w in WRONG]
)
def test_wrong_arguments_are_told_before_any_work(
    entry: str,
    arguments: dict[str, Any],
    kind: type[Exception],
    words: str,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something is captured already")

    monkeypatch.setattr("tomepass.handover.applied.capture_module", work)
    with pytest.raises(kind, match=words) as caught:
        CALLS[entry](model, IMAGES, **arguments)
    assert "fault of tomepass" not in str(caught.value)


# ---- the file of measurements ----------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(
    model: Any, tmp_path_factory: pytest.TempPathFactory, captured_once: None
) -> dict[str, Any]:
    """What calibration keeps in its file."""
    path = tmp_path_factory.mktemp("measured") / "cache.json"
    _calibrated(model, [IMAGES], cache=path, macs=1.0)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


PLACES: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda home: home,
    "in no folder": lambda home: home / "none" / "cache.json",
    "under a file": lambda home: home / "text" / "cache.json",
    "no name": lambda home: home / ("x" * 300),
    "no name at all": lambda home: f"{home}/a\0b",
    "text": lambda home: home / "text",
    "bytes": lambda home: home / "bytes",
    "a list": lambda home: home / "list",
    "deep": lambda home: home / "deep",
    "a device": lambda home: "/dev/zero",
}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("place", PLACES)
def test_a_cache_that_cannot_be_used_is_told(place: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("{")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "deep").write_text("[" * 100_000)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TomeError, match=r"cannot be read (and written|as measure)") as e:
        _calibrated(model, [IMAGES], cache=PLACES[place](tmp_path))
    assert "fault of tomepass" not in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before, "and nothing is left behind"


@pytest.mark.usefixtures("captured_once")
def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_measured(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("denied")

    def work(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something is measured already")

    monkeypatch.setattr(Path, "write_text", denied)
    monkeypatch.setattr("tomepass.calibration.measurements.block_linearity", work)
    with pytest.raises(TomeError, match="PermissionError: denied") as caught:
        _calibrated(model, [IMAGES], cache=tmp_path / "cache.json")
    assert isinstance(caught.value.__cause__, PermissionError)


BROKEN: dict[str, Any] = {
    "text": "x",
    "nothing": None,
    "too short": [[1.0], None],
    "text inside": [["a"] * 8, None],
    "numbers for agreement": [[0.0] * 8, [0.5] * 8],
    "a number": 3.0,
}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_measurement_is_told(
    kind: str, model: Any, measured: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "cache.json"
    for name in measured["known"]:
        if name == "linearity" and kind == "a number":
            continue
        known = {**measured["known"], name: BROKEN[kind]}
        path.write_text(json.dumps({**measured, "known": known}))
        with pytest.raises(TomeError, match="no measurement"):
            _calibrated(model, [IMAGES], cache=path, macs=1.0)


@pytest.mark.usefixtures("captured_once")
def test_a_schedule_that_overflows_is_not_chosen(
    model: Any, measured: dict[str, Any], tmp_path: Path
) -> None:
    known = {
        name: value if name == "linearity" else [[float("nan")] * 8, value[1]]
        for name, value in measured["known"].items()
    }
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({**measured, "known": known}))
    with pytest.raises(TomeError, match="outputs that are not finite"):
        _calibrated(model, [IMAGES], cache=path, macs=1.0)
