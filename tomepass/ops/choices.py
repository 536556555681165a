"""The operators that choose which tokens merge or go."""

from __future__ import annotations

from tomepass.ops.dropping.halt import halt
from tomepass.ops.dropping.prune import fuse_rest, order_by, select
from tomepass.ops.dropping.sample import sample
from tomepass.ops.matching.match import match
from tomepass.ops.matching.match_by import match_by
from tomepass.ops.matching.match_greedy import match_greedy
from tomepass.ops.matching.match_kmeans import match_kmeans
from tomepass.ops.matching.match_sets import match_sets
from tomepass.ops.matching.match_threshold import match_threshold

MATCHES = (match, match_by)
"""Operators whose answers are held against the plain reference."""


CHOICES = (
    *(*MATCHES, match_greedy, match_kmeans, match_sets, match_threshold),
    *(order_by, select, fuse_rest, sample, halt),
)
"""All operators that decide which token goes where."""
