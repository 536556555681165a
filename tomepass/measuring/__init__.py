"""Compiled against compiled: time and memory, in turns, with their spread.

May import: handover and every floor below.
Start reading: ``measure.py``; ``values.py`` is what it returns.
"""
