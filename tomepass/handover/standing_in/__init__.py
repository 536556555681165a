"""A module that stands in for the user's model: its attributes, class, methods and state.

May import: the files beside this folder that hold captures and choices, and every floor below.
Start reading: ``wrapping.py``.
"""
