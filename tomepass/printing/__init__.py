"""How tables, plots and pictures look; knows nothing of what they show.

May import: errors.
Start reading: ``style.py``.
"""
