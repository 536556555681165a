"""The ``tome::`` operators: functional, schema'd, composite.

They are registered for ``CompositeImplicitAutograd``: they run eagerly, differentiate, inline
under ``torch.compile``, and vanish in ``ExportedProgram.run_decompositions()``.
One file an operator; importing this package registers them all.
"""

from tomepass.ops import (
    attend,
    attention_to,
    combine,
    halt,
    keep_score,
    log_size,
    match,
    match_by,
    match_greedy,
    match_kmeans,
    match_sets,
    merge,
    prune,
    sample,
    soft,
    threshold,
    unmerge,
    weighted_mean,
)

__all__ = [
    "attend",
    "attention_to",
    "combine",
    "halt",
    "keep_score",
    "log_size",
    "match",
    "match_by",
    "match_greedy",
    "match_kmeans",
    "match_sets",
    "merge",
    "prune",
    "sample",
    "soft",
    "threshold",
    "unmerge",
    "weighted_mean",
]
