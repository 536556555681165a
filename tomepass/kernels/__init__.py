"""Kernels that take the place of composite operators where a graph is handed to Inductor."""
