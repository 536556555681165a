"""Methods that merge tokens.

May import: the rest of methods.
Start reading: ``tome.py``.
"""
