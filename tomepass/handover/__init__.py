"""Back to the user: `tomepass.apply`, and the merged module that stands in for the model.

May import: reporting and every floor below.
Start reading: ``applying.py``, then ``merged.py``, then ``applied.py``; ``standing_in/`` for
how a merged model passes for the model, ``compiling/`` for the backend of ``torch.compile``.
"""
