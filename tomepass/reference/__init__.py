"""A plain reference of Token Merging (Bolya et al., "Token Merging: Your ViT But Faster",
arXiv 2210.09461), to test other implementations against.

It shares no code with the rest of the package, imports only torch and the standard library, loops
over images in Python and computes in float64. It is meant to be read and trusted, not to be fast.

Notation: B images, N tokens, C channels, H heads, D channels a head. "Protected" tokens (class,
distillation and register tokens) take no part in the matching. Positions are those of the current
sequence, so after a merge the P protected tokens are at positions 0 .. P-1.

Read ``matching.py``, then ``merging.py``, then ``attention.py``.
"""

from tomepass.reference.attention import attention_to, proportional_attention, proportional_weights
from tomepass.reference.matching import Edges, kept, match, match_margin, merge_count, schedule
from tomepass.reference.merging import (
    combine,
    compose,
    merge,
    merged_bias,
    merged_rows,
    unmerge,
)

__all__ = [
    "Edges",
    "attention_to",
    "combine",
    "compose",
    "kept",
    "match",
    "match_margin",
    "merge",
    "merge_count",
    "merged_bias",
    "merged_rows",
    "proportional_attention",
    "proportional_weights",
    "schedule",
    "unmerge",
]
