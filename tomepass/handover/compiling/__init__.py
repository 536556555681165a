"""Back to a compiler: the backend of ``torch.compile``, and the compiler behind it.

May import: the choices of handover, and every floor below.
Start reading: ``backend.py``.
"""
