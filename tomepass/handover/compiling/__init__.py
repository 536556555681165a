"""The backend for ``torch.compile``, and the compiler to which it hands the rewritten graph.

May import: the choices of handover, and every floor below.
Start reading: ``backend.py``.
"""
