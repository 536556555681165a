"""Operators that choose which tokens merge with which.

May import: the rest of ops.
Start reading: ``match.py``, ToMe's bipartite soft matching.
"""
