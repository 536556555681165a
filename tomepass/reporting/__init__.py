"""What was found, done and refused, and which tokens were kept: values that print as tables.

May import: rewriting and every floor below.
Start reading: ``report.py``, which `tomepass.explain` returns.
"""
