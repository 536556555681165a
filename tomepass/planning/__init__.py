"""How many tokens go in which block, and what that saves: numbers, before any graph is touched.

May import: reading and every floor below.
Start reading: ``plan_graph.py``; ``streams.py`` is what it returns.
"""
