"""Methods whose choice is learned, and the weights that are trained for it.

May import: the rest of methods.
Start reading: ``policies.py``.
"""
