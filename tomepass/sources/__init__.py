"""Models, images and example inputs from outside.

May import: errors and printing.
Start reading: ``models.py``.
"""
