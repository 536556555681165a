"""Operators that choose which tokens are kept.

May import: the rest of ops.
Start reading: ``prune.py``.
"""
