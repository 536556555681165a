"""Turns a model's call into a graph of ATen operators, the same kind for every entry.

For `tomepass.apply` a model is exported with ``torch.export``; for the backend of ``torch.compile``
Dynamo hands over its graph. Both end in one dialect, described in ``exported.py``.

May import: graphs, model, ops, and what knows nothing of graphs.
Start reading: ``exported.py`` for `tomepass.apply`, ``dynamo.py`` for the backend;
``captured.py`` is what the first of them returns.
"""
