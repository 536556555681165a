"""Every reduction method, a row each: how it is made, and its plain reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import plain
import torch
from plain import Rule

from tomepass.methods import AdaViT, DynamicViT, Learned, Method, Policy, Prune

R = [5, 0, 9]


class Row(NamedTuple):
    """A method at some counts, and its rule."""

    make: Callable[..., Method]
    rule: Rule


def weights(kind: type[Learned], blocks: int = 3, width: int = 32) -> plain.Weights:
    """Random ones for each block; of AdaViT's, that a class token decides only little by."""
    drawn = torch.Generator().manual_seed(3)
    shapes = kind(policy=None).shapes(width)
    found = {
        i: {name: torch.randn(shape, generator=drawn) * 0.4 for name, shape in shapes.items()}
        for i in range(blocks)
    }
    for held in found.values():
        if "class.weight" in held:
            held["class.weight"] *= 0.2
            held["bias"] += 1.0
    return found


DYNAMICVIT, ADAVIT = weights(DynamicViT), weights(AdaViT)

ROWS: dict[str, Row] = {
    "prune": Row(Prune, plain.prune(lambda seen: seen.class_attention)),
    "prune_received": Row(
        lambda r, **fields: Prune(r, score="attention_received", **fields),
        plain.prune(lambda seen: seen.weights.mean((0, 1))),
    ),
    "prune_norm": Row(
        lambda r, **fields: Prune(r, score="norm", **fields),
        plain.prune(lambda seen: seen.hidden.norm(dim=-1)),
    ),
    "prune_random": Row(
        lambda r, **fields: Prune(r, score="random", seed=7, **fields),
        plain.prune(lambda seen: plain.shuffled(seen, 7)),
    ),
    "dynamicvit": Row(
        lambda r, **fields: DynamicViT(r, policy=Policy(DYNAMICVIT), **fields),
        plain.dynamicvit(DYNAMICVIT),
    ),
    "adavit": Row(
        lambda r, **fields: AdaViT(r, policy=Policy(ADAVIT), **fields),
        plain.adavit(ADAVIT),
    ),
}
