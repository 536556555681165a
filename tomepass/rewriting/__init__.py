"""Writes a new graph from the captured one, with the merges that were planned.

May import: planning and every floor below.
Start reading: ``sweep.py``, which goes through the captured graph once and copies or replaces each
node; ``epochs.py`` holds what is known about the tokens of a stream after each merge.
"""
