"""What all code that reads or writes graphs shares: nodes, their origin, constants, copies.

May import: model, ops and methods, and what knows nothing of graphs.
Start reading: ``canonical.py``, the value that all analysis takes; then ``nodes.py``.
"""
