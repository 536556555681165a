"""What the user gets: `tomepass.apply` and the merged module that it returns.

May import: reporting and every floor below.
Start reading: ``applying.py``, then ``merged.py``, then ``applied.py``; ``standing_in/`` for
how a merged module can be used wherever the model can, ``compiling/`` for the backend of
``torch.compile``.
"""
