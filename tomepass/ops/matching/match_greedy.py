"""``tome::match_greedy``: the most similar pairs of all tokens, without replacement."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_heads, each_image
from tomepass.ops.library import register, without_autocast
from tomepass.ops.matching.match import check_r
from tomepass.ops.matching.similarity import APART, UNKNOWN, comparable, head_mean, similarities
from tomepass.ops.padding import PADDED
from tomepass.ops.sequence import free_mask, in_sequence


@register(
    "match_greedy(Tensor features, SymInt r, int[] protected, Tensor? size, str similarity) "
    "-> (Tensor, Tensor)"
)
def match_greedy(
    features: Tensor, r: int, protected: list[int], size: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Merges the most similar pair, then the most similar of the rest, ``r`` times.

    The greedy matching of ToMe's ablations (arXiv 2210.09461, table 1e): a token is in one pair at
    most. Of a pair the token at the higher position goes to the lower one, and ties go to the
    lower positions. It takes r steps one after the other: for comparison, not for speed.

    Args:
        features: ``[B, H, N, D]``; compared by their mean over H.
        r: pairs to merge, at most half of the tokens that are not protected.
        protected: positions that take no part.
        size: ``[B, N]``, given where some tokens are padding: pairs of it come first, by position.
        similarity: ``"cosine"`` or ``"euclidean"``.

    Returns:
        ``[B, N]`` int64, each token's index among those left (protected ones, then the rest, by
        position), and ``[B, N - r]`` int64, the position of the token that stands there.

    Raises:
        ValueError: if ``r`` is more than can merge.
    """
    check_heads(features, "features")
    batch, _, tokens, _ = features.shape
    size = each_image(size, batch, tokens)
    check_r(r, tokens, protected)
    with torch.no_grad(), without_autocast(features.device):
        metric = head_mean(features)
        hidden = None if size is None else size < PADDED
        kinds = None if hidden is None else [hidden] * 2
        scores = similarities(metric, metric, similarity)
        scores = comparable(scores, kinds, unknown=UNKNOWN, apart=APART)
        if hidden is not None:  # first, by position: what padding holds decides nothing
            scores = torch.where(hidden[:, :, None] & hidden[:, None], float("inf"), scores)
        position = torch.arange(tokens, device=features.device)
        free = free_mask(tokens, protected, features.device)
        pair = (position[:, None] < position) & free[:, None] & free
        scores = torch.where(pair, scores, -float("inf"))
        into = position.expand(batch, -1)
        for _ in range(r):
            first = scores.flatten(1).argmax(-1, keepdim=True)
            low, high = first // tokens, first % tokens
            into = torch.where(position == high, low, into)
            used = (position == low) | (position == high)
            scores = torch.where(used.unsqueeze(1) | used.unsqueeze(2), -float("inf"), scores)
        return in_sequence(into, tokens - r, protected)
