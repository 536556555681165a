"""Token Merging, with the choices of its ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from tomepass.counts.schedule import all_but_one
from tomepass.methods.base import Method
from tomepass.methods.fields import choice, number, whole
from tomepass.methods.reduction import MLERP

if TYPE_CHECKING:
    from torch import fx

    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


Metric = Literal["keys", "keys_all_heads", "queries", "values", "hidden"]

Similarity = Literal["cosine", "dot", "euclidean", "softmax"]

Partition = Literal["alternating", "sequential", "random", "kth"]

Matching = Literal["bipartite", "greedy", "kmeans"]

Combine = Literal["weighted_mean", "mean", "max", "keep"]

Importance = Literal["none", "class_attention"]


@dataclass(frozen=True, repr=False, kw_only=True)
class ToMe(Method):
    """Token Merging, arXiv 2210.09461: bipartite soft matching of the attention keys.

    Args:
        metric: what tokens are compared by: the attention's ``"keys"``, ``"queries"`` or
            ``"values"``, the mean over heads; ``"keys_all_heads"``, all heads side by side;
            ``"hidden"``, the residual stream (table 1a).
        similarity: ``"cosine"``, ``"dot"``, ``"euclidean"`` or ``"softmax"``, what attention
            would give each destination (table 1b).
        combine: how tokens become one: ``"weighted_mean"`` by size, ``"mean"``, ``"max"`` of each
            channel, ``"keep"`` the destination's (table 1c), or :class:`MLERP`.
        matching: ``"bipartite"``; ``"greedy"``, the most similar pairs of all without
            replacement; ``"kmeans"``, clusters around evenly spaced tokens (table 1e).
        iterations: of k-means.
        partition: sources are the even positions (``"alternating"``), the first half
            (``"sequential"``), a ``"random"`` half (table 1d), or all but every ``k``-th
            (``"kth"``).
        k: of a ``"kth"`` partition.
        seed: of a random partition, which is the same everywhere for the same seed.
        importance: ``"class_attention"`` makes merging away a token dearer the more the class
            token attends to it (where there is none, the more all tokens do): its dissimilarity
            is multiplied with that attention to the power ``exponent``.
        exponent: of the importance.

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "tome"

    metric: Metric = "keys"
    similarity: Similarity = "cosine"
    combine: Combine | MLERP = "weighted_mean"
    matching: Matching = "bipartite"
    iterations: int = 2
    partition: Partition = "alternating"
    k: int = 2
    seed: int = 0
    importance: Importance = "none"
    exponent: float = 0.3

    def check(self) -> None:
        """Refuses choices there are none of, and two that make no sense together."""
        choice("metric", self.metric, get_args(Metric))
        choice("similarity", self.similarity, get_args(Similarity))
        choice("matching", self.matching, get_args(Matching))
        choice("partition", self.partition, get_args(Partition))
        choice("importance", self.importance, get_args(Importance))
        if not isinstance(self.combine, MLERP) and self.combine not in get_args(Combine):
            known = ", ".join(map(repr, get_args(Combine)))
            raise ValueError(f"combine must be one of {known}, or MLERP(...), got {self.combine!r}")
        self._set(
            iterations=whole("iterations", self.iterations, least=1),
            k=whole("k", self.k, least=2),
            seed=whole("seed", self.seed),
            exponent=number("exponent", self.exponent, 0, 100, above=True),
        )
        self._refuse_nonsense()

    def _refuse_nonsense(self) -> None:
        if self.importance != "none" and self.similarity in ("dot", "softmax"):
            raise ValueError(
                f"importance={self.importance!r} weighs dissimilarities, which "
                f"similarity={self.similarity!r} has none of: use 'cosine' or 'euclidean'"
            )
        idle = {
            "seed": self.partition != "random" and f"partition={self.partition!r}",
            "k": self.partition != "kth" and f"partition={self.partition!r}",
            "exponent": self.importance == "none" and "importance='none'",
            "iterations": self.matching != "kmeans" and f"matching={self.matching!r}",
        }
        if self.matching != "bipartite":
            idle |= dict.fromkeys(("partition", "importance"), f"matching={self.matching!r}")
            if self.similarity not in ("cosine", "euclidean"):
                idle["similarity"] = f"matching={self.matching!r}"
        for name, against in idle.items():
            value = getattr(self, name)
            if against and value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value!r} does nothing with {against}")

    def most(self, tokens: int, protected: tuple[int, ...]) -> int:
        """At most half; of a k-th partition, all that are sources; of clusters, all but one."""
        if self.matching == "kmeans":
            return all_but_one(tokens, protected)
        if self.partition == "kth":
            free = tokens - len(set(protected))
            return free - free // self.k if free >= self.k else 0
        return super().most(tokens, protected)

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Draws edges and merges the cheapest ``block.r`` of them."""
        if self.matching == "greedy":
            pairs = (block.r, block.protected, block.masked_size, self.similarity)
            return block.matched("match_greedy", self.features(block), *pairs, combine=self.combine)
        if self.matching == "kmeans":
            clusters = (block.r, block.protected, block.masked_size, self.similarity)
            args = (self.features(block), *clusters, self.iterations)
            return block.matched("match_kmeans", *args, combine=self.combine)
        if self._plain:
            apart = () if block.masked_size is None else (block.masked_size,)
            return block.matched(
                "match", block.keys, block.r, block.protected, *apart, combine=self.combine
            )
        importance = None if self.importance == "none" else block.class_attention
        return block.matched(
            "match_by",
            self.features(block),
            *(block.r, block.protected, block.masked_size, importance, self.exponent),
            *(self.similarity, self.partition, self.k if self.partition == "kth" else self.seed),
            combine=self.combine,
        )

    def features(self, block: ReducingBlock) -> fx.Node:
        """What tokens are compared by, ``[B, H, N, D]``: the mean over H counts."""
        if self.metric == "keys_all_heads":
            return block.side_by_side(block.keys)
        if self.metric == "hidden":
            return block.side_by_side(block.hidden)
        features: fx.Node = getattr(block, self.metric)
        return features

    def variants(self, linearity: tuple[float, ...]) -> tuple[Method, ...]:
        """The choices that made a difference: importance, exponent, metric, combination."""
        if self.matching != "bipartite" or self.similarity not in ("cosine", "euclidean"):
            return ()
        found: list[dict[str, Any]] = [
            {"importance": "class_attention", "exponent": exponent} for exponent in (0.3, 0.5, 0.7)
        ]
        found += [{"metric": metric} for metric in ("keys_all_heads", "hidden")]
        found += [{"combine": MLERP()}]
        return tuple(self.replace(**changes) for changes in found)

    @property
    def _plain(self) -> bool:
        """Whether tokens are matched as the paper does by default: ``tome::match``."""
        chosen = (self.metric, self.similarity, self.partition, self.importance)
        return chosen == ("keys", "cosine", "alternating", "none")

    @classmethod
    def fields_from(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Fields as :meth:`to_dict` wrote them, back in their own types."""
        fields = super().fields_from(data)
        if isinstance(combine := fields.get("combine"), dict):
            fields["combine"] = MLERP(combine["mlerp"])
        return fields
