"""The plan, written into the graph.

May import: planning and every floor below.
Start reading: ``sweep.py``, which goes through the captured graph once; ``epochs.py`` holds
what is known between two merges.
"""
