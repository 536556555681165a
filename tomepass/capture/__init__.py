"""A model as one dialect of graph, captured by ``torch.export`` or handed over by Dynamo.

May import: graphs, model, ops, and what knows nothing of graphs.
Start reading: ``exported.py`` for `tomepass.apply`, ``dynamo.py`` for the backend;
``captured.py`` is what the first of them returns.
"""
