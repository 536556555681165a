"""May the merged model be trusted? `tomepass.check` and its lines.

May import: handover and every floor below.
Start reading: ``check.py``; ``report.py`` is what it returns.
"""
