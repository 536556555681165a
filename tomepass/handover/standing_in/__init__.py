"""Lets a merged module be used wherever the model can: same attributes, class, methods and state.

May import: the files beside this folder that hold captures and choices, and every floor below.
Start reading: ``wrapping.py``.
"""
