"""Operators around attention: sizes as a bias, attention weights, masked attention.

May import: the rest of ops.
Start reading: ``log_size.py``, which is proportional attention.
"""
