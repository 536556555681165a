"""Traces the graph that Dynamo hands to a backend into the dialect that exported models have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource, LocalSource
from torch._guards import Source, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from tomepass.capture.dialect import placeholders, to_dialect
from tomepass.capture.fused_layers import DECOMPOSITIONS
from tomepass.capture.regions import Inlining
from tomepass.errors import NotCaptured
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.origin import ORIGIN, source_line

# What Dynamo leaves on a placeholder and Inductor needs: static inputs, CUDA graphs, names.
_CARRIED_META = ("tensor_dict", "grapharg", *ORIGIN)


def capture_dynamo(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    decompositions: Mapping[Any, Any] = DECOMPOSITIONS,
) -> CanonicalGraph:
    """Re-traces a Dynamo graph into the dialect; placeholders keep their order and metadata.

    Args:
        decompositions: what is written out: operators, and functions that are traced instead.
    """
    if (replaced := _replaced_data(gm)) is not None:
        raise NotCaptured(
            "the model replaces the data of its own parameters in its forward",
            node=replaced.name,
            source=source_line(replaced),
            advice="fold what it adds to its weights into them first, as merge_and_unload() of a "
            "model with adapters does",
        )
    mode = detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_as_fake(mode, value) for value in example_inputs]
    allowed = mode.allow_non_fake_inputs
    # Inductor's freezing hands over real constants instead of parameters.
    mode.allow_non_fake_inputs = True
    try:
        with mode, fx_traceback.preserve_node_meta():
            traced = make_fx(
                Inlining(gm).run,
                decomposition_table=dict(decompositions),
                pre_dispatch=True,
                _allow_non_fake_inputs=True,
            )(*fakes)
    finally:
        mode.allow_non_fake_inputs = allowed
    data, learned = set(), set()
    for old, new, value in zip(*placeholders(gm, traced), example_inputs, strict=True):
        new.meta.update({k: old.meta[k] for k in _CARRIED_META if k in old.meta})
        state = isinstance(value, Tensor) and _is_state(value, old)
        if isinstance(value, Tensor) and value.ndim and not state:
            data.add(new.name)
        if isinstance(value, nn.Parameter) and state:
            learned.add(new.name)
    to_dialect(traced)
    return CanonicalGraph(traced, frozenset(data), True, frozenset(learned))


def carry_marks(gm: fx.GraphModule, rewritten: fx.GraphModule) -> fx.GraphModule:
    """Puts what Dynamo left beside its graph on the graph rewritten from it, and returns that.

    AOTAutograd reads off it which inputs are parameters; CUDA graphs copy all the others.
    """
    rewritten.meta.update(gm.meta)
    for old, new in zip(*placeholders(gm, rewritten), strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    # With Inductor's freezing the parameters are constants in the graph, under new names.
    if hasattr(gm, "_param_name_to_source") and not any(True for _ in rewritten.parameters()):
        sources: Any = gm._param_name_to_source
        own = {name: ConstantSource(name) for name, _ in rewritten.named_buffers()}
        rewritten._param_name_to_source = own | sources
    return rewritten


def fix_sizes(
    captured: CanonicalGraph, gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> CanonicalGraph:
    """Fixes all sizes of the user's inputs but the batch: a merge counts the tokens there are.

    Reading a symbolic size installs Dynamo's guard on it, so another resolution is another graph.
    """
    inputs = captured.graph.find_nodes(op="placeholder")
    sizes = [size for n in inputs if n.name in captured.data for size in n.meta["val"].shape[1:]]
    symbolic = [int(size) for size in sizes if isinstance(size, torch.SymInt)]
    return capture_dynamo(gm, example_inputs) if symbolic else captured


def _as_fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value)
    if isinstance(value, torch.SymInt) and (fixed := value.node.maybe_as_int()) is not None:
        return fixed
    return value


def _is_state(value: Tensor, placeholder: fx.Node) -> bool:
    """Is it the model's, and not one of the inputs it is called with?"""
    source = getattr(placeholder, "_dynamo_source", None)
    if isinstance(value, nn.Parameter):
        return not (isinstance(source, LocalSource) and source.is_input)
    # Dynamo marks a module's buffers as static inputs; users mark inputs of theirs too.
    marked = hasattr(value, "_dynamo_static_input_type")
    return marked and (source is None or _in_a_module(source))


def _replaced_data(gm: fx.GraphModule) -> fx.Node | None:
    """Where a Dynamo graph assigns to a tensor's ``data``."""
    return next((n for n in gm.graph.nodes if n.target is Tensor.set_), None)


def _in_a_module(source: Source) -> bool:
    """Does Dynamo read it off a module?"""
    kind: Any = source.guard_source
    kind = kind() if callable(kind) else kind  # a method in some versions
    return "MODULE" in kind.name
