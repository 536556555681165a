"""Every reduction method, a row each: how it is made, and its plain reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import plain
import torch
from plain import Rule

from tomepass.methods import (
    ATS,
    AdaViT,
    AViT,
    DiffRate,
    DynamicViT,
    EViT,
    Learned,
    Method,
    PiToMe,
    Policy,
    Prune,
    SPViT,
    Threshold,
    ToFu,
    ToMe,
)

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
    "evit": Row(EViT, plain.fused(lambda seen: seen.class_attention)),
    "evit_without_fusion": Row(
        lambda r, **fields: EViT(r, fuse=False, **fields),
        plain.prune(lambda seen: seen.class_attention),
    ),
    "spvit": Row(SPViT, plain.fused(lambda seen: seen.weights.mean((0, 1)))),
    "tofu": Row(ToFu, plain.tofu(("prune", "merge", "merge"))),
    "tofu_measured": Row(
        lambda r, **fields: ToFu(r, strategies=("merge", "prune", "prune"), **fields),
        plain.tofu(("merge", "prune", "prune")),
    ),
    "pitome": Row(PiToMe, plain.pitome),
    "diffrate": Row(DiffRate, plain.diffrate(lambda index, r: r // 2)),
    "diffrate_shares": Row(
        lambda r, **fields: DiffRate(r, pruned=(0.8, 0.0, 0.0), **fields),
        plain.diffrate(lambda index, r: (4, 0, 0)[index]),
    ),
    "greedy": Row(lambda r, **fields: ToMe(r, matching="greedy", **fields), plain.greedy),
    "kmeans": Row(
        lambda r, **fields: ToMe(r, matching="kmeans", iterations=3, **fields),
        plain.kmeans(3),
    ),
    "kth": Row(
        lambda r, **fields: ToMe(r, partition="kth", k=4, **fields),
        plain.kth(4),
    ),
    "ats": Row(ATS, plain.ats),
    "threshold": Row(lambda r, **fields: Threshold(r, tau=0.85, **fields), plain.threshold(0.85)),
    "threshold_unweighted": Row(
        lambda r, **fields: Threshold(r, tau=0.7, prop_attn=False, **fields), plain.threshold(0.7)
    ),
    "avit": Row(lambda r, **fields: AViT(r, gamma=1.0, beta=-0.9, **fields), plain.avit(1.0, -0.9)),
    "dynamicvit": Row(
        lambda r, **fields: DynamicViT(r, policy=Policy(DYNAMICVIT), **fields),
        plain.dynamicvit(DYNAMICVIT),
    ),
    "adavit": Row(
        lambda r, **fields: AdaViT(r, policy=Policy(ADAVIT), **fields),
        plain.adavit(ADAVIT),
    ),
}
