"""Compares a captured graph with the model, by running both on the first inputs.

``torch.export`` runs a model's Python code with tensors that have no values. Where a model reads
something other than tensors, or behaves differently while it is traced, the graph can compute
another function without any error being raised. This comparison finds that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tomepass.errors import NotCaptured, first_lines
from tomepass.model.batches import Form, first_of
from tomepass.model.calls import call_with
from tomepass.model.guards import Guards
from tomepass.model.twin import Twin
from tomepass.ops.library import autocasts

if TYPE_CHECKING:
    from tomepass.capture.captured import Capture


class NotCapturedError(NotCaptured):
    """A model that no graph can stand for, as it is now.

    Args:
        guards: whether it still is what it was then.
    """

    def __init__(self, reason: str, *, guards: Guards, **where: Any) -> None:
        super().__init__(reason, **where)
        self.guards = guards


# By how much a graph's outputs may differ, as a share of the largest.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}


_COARSE = 0.05  # of half precision


def can_be_held(call: Mapping[str, Any]) -> bool:
    """Do the inputs have values to compute with, and does nobody follow what is computed?"""
    tensors = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    return not (
        any(t.is_meta or isinstance(t, FakeTensor) or _is_wrapped(t) for t in tensors)
        or _get_current_dispatch_mode_stack()
        or torch._C._get_tracing_state() is not None
    )


def hold_against(
    model: nn.Module, capture: Capture, call: dict[str, Any], method: str
) -> str | None:
    """Runs a capture, nothing merged, and the model on the first and the last of some inputs.

    Where the model does not take these two, on all of them, then on the first alone.

    Args:
        model: whose twin is run, so that it stays as it is.
        call: keyword inputs of its method.

    Returns:
        why they could not be compared, in words; None if they agree.

    Raises:
        NotCapturedError: if the outputs differ: the capture is not the model.
    """
    # Nothing of this is kept for a backward: hooks that count what is do not see it.
    unseen = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    # Nothing is made in inference mode that lives on, unless the model asks for that mode.
    inference = torch.is_inference_mode_enabled() and capture.guards.modes.asks_for_inference
    with torch.inference_mode(inference), torch.set_grad_enabled(capture.grad), unseen:
        failures: list[Exception] = []
        for given in _choices(capture.form, call):
            inputs = pytree.tree_map(_plain, given)
            try:
                expected, form = _of_the_model(model, method, inputs)
            except Exception as error:  # as many are not what it takes
                failures.append(error)
            else:
                break
        else:
            # Of all of them, if these are not the first two.
            raised = failures[min(1, len(failures) - 1)]
            return (
                "the capture could not be compared with the model, which raises on these inputs "
                f"({type(raised).__name__}: {first_lines(raised)}): nothing has shown that both "
                "compute the same"
            )
        if form != capture.out_spec:
            raise _another(model, capture, f"it returns {capture.out_spec}, the model {form}")
        got = _of_the_graph(model, capture, inputs)
        if (found := _difference(got, expected)) is None:
            return None
        if _draws(capture):
            # Random numbers may come in another order: then the model differs from itself too.
            again, _ = _of_the_model(model, method, inputs, seed=1)
            if _difference(again, expected) is not None:
                return None
    raise _another(model, capture, found)


def _choices(form: Form, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs to compare on, the best first; none of a batch size that came before."""
    tried = set()
    for given in (form.few(call), call, form.rows(call, slice(0, 1))):
        first = first_of(given)
        assert first is not None
        if first.shape[0] not in tried:
            tried.add(first.shape[0])
            yield given


def _same(value: Tensor) -> Tensor:
    return value


def _another(model: nn.Module, capture: Capture, difference: str) -> NotCapturedError:
    return NotCapturedError(
        f"the graph that torch.export makes of {type(model).__name__} is another function than "
        f"the model: {difference}",
        advice="somewhere the model goes another way while torch.compiler.is_compiling(), or "
        "reads what a graph cannot hold; take that out, or leave the model unmerged with "
        'on_unmatched="warn"',
        guards=capture.guards,
    )


def called_once(model: nn.Module, method: str, inputs: dict[str, Any]) -> Twin:
    """A twin as a first call leaves it: with its flags, hooks and all that it stored."""
    twin = Twin(model, noting=False)
    called = twin.model if method == "forward" else getattr(twin.model, method)
    with torch.no_grad(), _seeded(inputs, 0):
        call_with(called, inputs)
    return twin


def _of_the_model(
    model: nn.Module, method: str, inputs: dict[str, Any], seed: int = 0
) -> tuple[list[Any], pytree.TreeSpec]:
    twin = Twin(model, noting=False).model
    called = twin if method == "forward" else getattr(twin, method)
    with _seeded(inputs, seed):
        return pytree.tree_flatten(call_with(called, inputs))


def _of_the_graph(model: nn.Module, capture: Capture, inputs: dict[str, Any]) -> list[Any]:
    from tomepass.capture.captured import read_state

    with _seeded(inputs, 0):
        values = [*read_state(model, capture), *pytree.tree_leaves(inputs)]
        return list(capture.graph.module(*values))


@contextmanager
def _seeded(inputs: dict[str, Any], seed: int) -> Iterator[None]:
    """Random numbers of its own, which leave the user's as they were."""
    leaves = pytree.tree_leaves(inputs)
    devices = {v.device for v in leaves if isinstance(v, Tensor) and v.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def _difference(got: list[Any], expected: list[Any]) -> str | None:
    """What differs most between outputs, if more than rounding does."""
    worst, words = 0.0, None
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if not isinstance(theirs, Tensor):
            continue  # numbers and words stand in the graph as they were
        if not isinstance(ours, Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {place} is {_described(ours)}, the model's {_described(theirs)}"
        error = _relative_error(ours, theirs)
        if not error <= _tolerance(theirs) and not error <= worst:
            worst = error
            words = f"output {place} ({_described(theirs)}) differs by {error:.1e} of the largest"
    return words


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel():
        return 0.0
    if not (theirs.is_floating_point() or theirs.is_complex()):
        # Rounding may turn a comparison.
        return float((ours != theirs).double().mean())
    ours, theirs = ours.detach(), theirs.detach()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    finite = theirs.isfinite()
    if not bool((same | (finite & ours.isfinite())).all()):
        return float("inf")
    apart = torch.where(same, 0.0, (ours - theirs).abs().double())
    largest = torch.where(finite, theirs.abs().double(), 0.0).amax()
    return float(apart.amax() / largest.clamp_min(1e-12))


def _tolerance(value: Tensor) -> float:
    if not value.is_floating_point() or autocasts(value.device):
        return _COARSE
    return _TOLERANCES.get(value.dtype, _COARSE)


def _draws(capture: Capture) -> bool:
    """Does the graph draw random numbers?"""
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in capture.graph.graph.nodes
    )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _plain(value: Any) -> Any:
    """An input without its history; one made in inference mode could not be trained with."""
    if not isinstance(value, Tensor):
        return value
    plain = value.detach().clone() if value.is_inference() else value.detach()
    return plain.requires_grad_(value.requires_grad)  # a model may ask


def _is_wrapped(value: Tensor) -> bool:
    """Does a transform of torch.func, or a tracer, stand between us and the values?"""
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(value)) or torch._is_functional_tensor(value)
