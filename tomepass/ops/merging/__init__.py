"""Operators that merge values, and give each original token its value back.

May import: the rest of ops.
Start reading: ``merge.py`` and ``unmerge.py``.
"""
