"""Kernels in place of composite operators: under Inductor on a CPU, and everywhere on CUDA.

May import: reading and every floor below.
Start reading: ``choose.py``, which puts them into a graph; ``cpu.py`` and ``gpu/`` hold them.
"""
