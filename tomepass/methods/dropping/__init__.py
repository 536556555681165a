"""Methods that let tokens go.

May import: the rest of methods.
Start reading: ``prune.py``.
"""
