"""The ``tome::`` operators: functional, schema'd, composite.

They are registered for ``CompositeImplicitAutograd``: they run eagerly, differentiate, inline
under ``torch.compile``, and vanish in ``ExportedProgram.run_decompositions()``.
One file an operator; importing this package registers them all.

May import: counts, errors.
Start reading: ``library.py``, then ``matching/match.py`` and ``merging/merge.py``.
"""

from __future__ import annotations

from tomepass.ops.attending import attend, attention_to, log_size, soft
from tomepass.ops.dropping import halt, keep_score, prune, sample
from tomepass.ops.matching import match, match_by, match_greedy, match_kmeans, match_sets
from tomepass.ops.matching import match_threshold as threshold
from tomepass.ops.merging import combine, merge, unmerge, weighted_mean

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
