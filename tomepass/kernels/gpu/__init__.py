"""The same operators in Triton, for CUDA.

May import: the other kernels, and every floor below.
Start reading: ``choose.py``; ``match.py`` and ``merge.py`` are operators, ``triton_*.py`` their
kernels.
"""
