"""Proportional attention on CUDA: which exact path, by length, dtype and head size.

| path | what it is |
|---|---|
| bias | ``log(size)`` as a bias: PyTorch takes its memory-efficient kernel, as flash has no bias |
| channel | ``log(size)`` as two more channels of the keys, under flash |
| scaled | values times sizes with a column for the denominator, under flash |
| cudnn | ``log(size)`` as a bias of cuDNN's kernel |

``MEASURED`` holds what ``python -m benchmarks gpu --only attention`` found. Where no rule fits, or
its path cannot compute an attention, the bias is taken, and the report says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from tomepass.graphs.nodes import FUSED, argument
from tomepass.graphs.origin import carry_origin, carry_value, value_of
from tomepass.ops.attending.attend import attend_channel, attend_cudnn, attend_scaled
from tomepass.ops.attending.log_size import log_size

aten = torch.ops.aten

Path = Literal["bias", "channel", "scaled", "cudnn"]

_OPERATORS: dict[str, Any] = {
    "channel": attend_channel,
    "scaled": attend_scaled,
    "cudnn": attend_cudnn,
}


_HOW = {
    "bias": "log(size) as a bias",
    "channel": "log(size) as two more key channels",
    "scaled": "values scaled by size, and a column for the denominator",
    "cudnn": "log(size) as a bias of cuDNN's kernel",
}


_DEFAULT = "the default: nothing measured for this device and shape"

_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rule:
    """A path that was fastest for some attentions.

    Args:
        path: that was taken.
        capability: of the device, ``(9, 0)`` for Hopper.
        dtypes: of queries, keys and values.
        widths: channels a head.
        least: keys there are at least.
        most: keys there are at most.
    """

    path: Path
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    least: int = 0
    most: int = 1 << 30

    def fits(self, capability: tuple[int, int], keys: int, dtype: torch.dtype, width: int) -> bool:
        """Does it speak of such an attention?"""
        here = self.capability == capability and self.least <= keys <= self.most
        return here and dtype in self.dtypes and width in self.widths


MEASURED: tuple[Rule, ...] = ()
"""Empty until a device has been measured: figures are not guessed."""


def path_for(
    capability: tuple[int, int], keys: int, dtype: torch.dtype, width: int
) -> tuple[Path, str]:
    """The fastest path known, and why it is the bias where none was measured or it cannot be."""
    fitting = (rule.path for rule in MEASURED if rule.fits(capability, keys, dtype, width))
    path = next(fitting, None)
    if path is None:
        return "bias", _DEFAULT
    # cuDNN's kernel multiplies narrow dtypes only, in heads of whole 16 bytes.
    if path == "cudnn" and (dtype not in _NARROW or width % 8):
        return "bias", f"the fastest, cuDNN's kernel, takes no {dtype} in heads of {width}"
    return path, ""


def take_gpu_attention(module: fx.GraphModule) -> tuple[str, ...]:
    """Puts the proportional attentions of a CUDA graph on the fastest path known, in place.

    Attentions with another bias beside ``log(size)`` keep it.

    Returns:
        a line on each path that was taken, and on each reason why another was not.
    """
    taken: dict[str, int] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=FUSED)):
        bias = argument(node, 3, "attn_mask")
        if (beside := _beside(bias)) is None:
            continue
        path, why = _path_of(node, beside)
        how = _HOW[path] + (f" ({why})" if why else "")
        taken[how] = taken.get(how, 0) + 1
        if path != "bias":
            _replace(node, bias, _OPERATORS[path])
    module.recompile()
    return tuple(f"{n} attention{'s' * (n > 1)}: {how}" for how, n in taken.items())


def _path_of(node: fx.Node, beside: str) -> tuple[Path, str]:
    """The path of one attention, and why it is the bias where another may be faster."""
    if beside:
        return "bias", beside
    keys: Tensor = value_of(node.args[1])
    path, why = path_for(_capability(keys.device), int(keys.shape[2]), keys.dtype, keys.shape[3])
    if path != "bias" and node.kwargs.get("enable_gqa"):
        return "bias", "heads share keys"
    if path != "bias" and argument(node, 4, "dropout_p", 0.0):
        return "bias", "with dropout"
    return path, why


def _beside(bias: Any) -> str | None:
    """What a bias is beside ``log(size)``: empty for nothing, None where there is no log(size)."""
    target = bias.target if isinstance(bias, fx.Node) else None
    if target is log_size:
        return ""
    if target is aten.clamp.default and _beside(bias.args[0]) is not None:
        return "sizes hide padding and do no more"
    if target is aten.add.Tensor and any(_beside(a) is not None for a in bias.args):
        return "with another bias beside it"
    return None


def _replace(node: fx.Node, bias: fx.Node, target: Any) -> None:
    scale = node.kwargs.get("scale")
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, (*node.args[:3], bias.args[0], scale))
    carry_origin(made, node)
    carry_value(made, node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    if not bias.users:
        bias.graph.erase_node(bias)


def _capability(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():
        return (0, 0)
    return torch.cuda.get_device_capability(device)
