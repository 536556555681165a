"""Simplifies a captured graph in place, so that each operation is written in only one way.

Assertions on metadata are dropped, subgraphs that run under a mode of their own are inlined, all
concatenations become ``aten.cat``, equal computations are done once, and attention masks that hide
nothing are left out.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from tomepass.capture.idle_masks import drop_idle_masks
from tomepass.capture.subexpressions import merge_duplicates
from tomepass.model.checkpointing import is_reentrant

aten = torch.ops.aten


# Checks on the input's metadata: our captures are keyed by what they check.
_ASSERTIONS = (aten._assert_tensor_metadata.default,)


_CONCATENATIONS = (aten.concat.default, aten.concatenate.default)

# Regions under a mode of their own, and which argument is their body.
_REGIONS: dict[Any, int] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


# Cuts a constant off autograd: in place, but no values change.
_DETACH = torch.ops.aten.detach_.default


def to_dialect(module: fx.GraphModule) -> None:
    """Drops assertions on metadata; inlines regions; spells every concatenation ``aten.cat``."""
    while regions := [n for n in module.graph.nodes if n.target in _REGIONS]:
        _inline(module, regions[0])
    for node in list(module.graph.nodes):
        if node.target in _ASSERTIONS:
            module.graph.erase_node(node)
        elif node.target is aten.hstack.default and node.meta["val"].ndim > 1:
            node.target, node.args = aten.cat.default, (node.args[0], 1)
        elif node.target in _CONCATENATIONS:
            node.target = aten.cat.default
    merge_duplicates(module)
    drop_idle_masks(module)
    module.recompile()


def _inline(module: fx.GraphModule, region: fx.Node) -> None:
    """Puts a region under another gradient or autocast mode in its place.

    What leaves a region without gradients is cut off autograd. What autocast casts stands in the
    graph as operators of its own.
    """
    arguments: list[Any] = list(region.args)
    at = _REGIONS[region.target]
    body, *operands = arguments[at:]
    inner = cast(fx.GraphModule, module.get_submodule(body.target)).graph
    # Reentrant checkpoints run without gradients, and again with them in the backward.
    without_gradients = at == 1 and arguments[0] is False and not is_reentrant(inner.nodes)
    placed = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    results: Any = ()
    with module.graph.inserting_before(region):
        for node in inner.nodes:
            if node.op == "output":
                results = node.args[0]
            elif node.op != "placeholder":
                placed[node] = module.graph.node_copy(node, lambda n: placed[n])
        for taken in list(region.users):
            result = placed[results[int(cast(int, taken.args[1]))]]
            if without_gradients and isinstance(result.meta.get("val"), Tensor):
                value = result.meta["val"]
                result = module.graph.call_function(aten.detach.default, (result,))
                result.meta["val"] = value
            taken.replace_all_uses_with(result)
            module.graph.erase_node(taken)
    module.graph.erase_node(region)


def spell_out(literal: fx.Node, value: Tensor) -> None:
    """Makes a number written ``torch.tensor(0.0)`` a number in the graph, for masks to be read."""
    if value.ndim or value.is_meta or not isinstance(number := value.item(), (bool, int, float)):
        return
    for copy in [n for n in literal.users if n.target is aten.lift_fresh_copy.default]:
        with copy.graph.inserting_before(copy):
            kwargs: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            made = copy.graph.call_function(aten.full.default, ([], number), kwargs)
        made.meta = dict(copy.meta)
        for same in [n for n in copy.users if n.target is _DETACH]:
            same.replace_all_uses_with(copy)
            copy.graph.erase_node(same)
        copy.replace_all_uses_with(made)
        copy.graph.erase_node(copy)


def placeholders(*modules: fx.GraphModule) -> list[list[fx.Node]]:
    return [module.graph.find_nodes(op="placeholder") for module in modules]


def written_input(module: fx.GraphModule) -> fx.Node | None:
    """A node that changes what it was given in place: a parameter, a buffer, the user's input."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            schema = getattr(node.target, "_schema", None)
            if schema is None or not schema.is_mutable or node.target is _DETACH:
                continue
            for argument, value in zip(schema.arguments, node.args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and _viewed(value).op == "placeholder":
                    return node  # type: ignore[no-any-return]
    return None


def _viewed(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views and in-place operators shares."""
    while schema := getattr(node.target, "_schema", None):
        if not schema.returns or schema.returns[0].alias_info is None:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node
