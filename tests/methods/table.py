"""Every reduction method, a row each: how it is made, and its plain reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import plain
import torch
from plain import Rule

from tomepass.methods import (
    ATS,
    MLERP,
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
    "tome_as_published": Row(ToMe, plain.tome()),
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
    "pitome": Row(PiToMe, plain.pitome()),
    "diffrate": Row(DiffRate, plain.diffrate(lambda index, r: r // 2)),
    "diffrate_shares": Row(
        lambda r, **fields: DiffRate(r, pruned=(0.8, 0.0, 0.0), **fields),
        plain.diffrate(lambda index, r: (4, 0, 0)[index]),
    ),
    "greedy": Row(lambda r, **fields: ToMe(r, matching="greedy", **fields), plain.greedy()),
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


def option(kind: Callable[..., Method], rule: Rule, **options: Any) -> Row:
    """A method with some of its options."""
    return Row(lambda r, **fields: kind(r, **options, **fields), rule)


def tome(rule: Rule, **options: Any) -> Row:
    return option(ToMe, rule, **options)


WEIGHED = {"importance": "class_attention"}

OPTIONS: dict[str, Row] = {
    "tome_queries": tome(plain.tome("queries"), metric="queries"),
    "tome_values": tome(plain.tome("values"), metric="values"),
    "tome_keys_all_heads": tome(plain.tome("keys_all_heads"), metric="keys_all_heads"),
    "tome_hidden": tome(plain.tome("hidden"), metric="hidden"),
    "tome_importance": tome(plain.tome(exponent=0.3), **WEIGHED),
    "tome_importance_of_distances": tome(
        plain.tome(likeness="euclidean", exponent=1.0),
        **WEIGHED,
        similarity="euclidean",
        exponent=1.0,
    ),
    "tome_dot_mean": tome(
        plain.tome(likeness="dot", combine="mean"), similarity="dot", combine="mean"
    ),
    "tome_softmax_max": tome(
        plain.tome(likeness="softmax", combine="max"), similarity="softmax", combine="max"
    ),
    "tome_sequential_keep": tome(
        plain.tome(partition="sequential", combine="keep"), partition="sequential", combine="keep"
    ),
    "tome_random_mlerp": tome(
        plain.tome(partition="random", seed=5, combine="mlerp"),
        partition="random",
        seed=5,
        combine=MLERP(),
    ),
    "tome_mlerp_mean": tome(plain.tome(combine="mlerp_mean"), combine=MLERP("mean")),
    "greedy_hidden": tome(
        plain.greedy("hidden", "euclidean"),
        matching="greedy",
        metric="hidden",
        similarity="euclidean",
    ),
    "kmeans_values": tome(plain.kmeans(2, "values"), matching="kmeans", metric="values"),
    "kmeans_euclidean": tome(
        plain.kmeans(2, likeness="euclidean"), matching="kmeans", similarity="euclidean"
    ),
    "spvit_class_attention": option(
        SPViT, plain.fused(lambda seen: seen.class_attention), score="class_attention"
    ),
    "spvit_norm": option(SPViT, plain.fused(lambda seen: seen.hidden.norm(dim=-1)), score="norm"),
    "pitome_margin": option(PiToMe, plain.pitome(0.3), margin=0.3),
    "tofu_mlerp_mean": option(
        ToFu,
        plain.tofu(("merge", "prune", "merge"), "mlerp_mean"),
        strategies=("merge", "prune", "merge"),
        mlerp=MLERP("mean"),
    ),
    "avit_epsilon": option(AViT, plain.avit(1.0, -0.9, 0.4), gamma=1.0, beta=-0.9, epsilon=0.4),
}
"""Options that change what is computed, and not how it is built: held against their rules."""
