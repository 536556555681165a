"""Where PyTorch's fused encoder layer computes without modules that stand in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tomepass.errors import NotCaptured


def refuse_skipped_modules(model: nn.Module) -> None:
    """Raises a TomeError where the model itself leaves out what its capture would compute.

    In eval mode ``nn.TransformerEncoderLayer`` reads the weights of its linear layers and calls
    none of them, so that an adapter in their place does nothing; written out it is called.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and _is_fused(layer):
            parts = (layer.linear1, layer.linear2, layer.norm1, layer.norm2)
            strange = [type(m) for m in parts if type(m) not in (nn.Linear, nn.LayerNorm)]
            if strange:
                kind = f"{strange[0].__module__.split('.')[0]}.{strange[0].__name__}"
                raise NotCaptured(
                    f"{name or type(layer).__name__} runs as one fused operator, which reads "
                    f"weights and leaves out the {kind} around them: the model itself ignores it",
                    advice="call torch.backends.mha.set_fastpath_enabled(False) first, under which "
                    "the model does what it should; or fold adapters into the weights",
                )


def _is_fused(layer: nn.TransformerEncoderLayer) -> bool:
    """Does the layer take its fused path, as far as its settings tell?

    ``nn.TransformerEncoderLayer.forward`` asks the same; of autocast, that of CUDA alone.
    """
    attention = layer.self_attn
    return (
        torch.backends.mha.get_fastpath_enabled()
        and not layer.training
        and bool(layer.activation_relu_or_gelu)
        and getattr(attention, "batch_first", False)
        and getattr(attention, "in_proj_bias", None) is not None
        and getattr(attention, "num_heads", 1) % 2 == 0
        and getattr(attention, "_qkv_same_embed_dim", False)
        and getattr(layer.norm1, "eps", None) == getattr(layer.norm2, "eps", None)
        and not torch.is_autocast_enabled("cuda")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in _read(layer)))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    )


def _read(layer: nn.TransformerEncoderLayer) -> list[Tensor]:
    """The weights and biases that the fused operator reads."""
    attention = layer.self_attn
    modules = (attention.out_proj, layer.linear1, layer.linear2, layer.norm1, layer.norm2)
    held = [getattr(m, name, None) for m in modules for name in ("weight", "bias")]
    held += [attention.in_proj_weight, attention.in_proj_bias]
    return [value for value in held if isinstance(value, Tensor)]
