"""The user's model as it is called: its inputs, its twin to trace, what its forward read.

May import: ops and methods, and what knows nothing of graphs.
Start reading: ``calls.py`` and ``batches.py``; ``twin.py`` and ``guards.py`` for what happens
when the model changes after it was captured.
"""
