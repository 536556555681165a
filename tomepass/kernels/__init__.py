"""Kernels in place of composite operators: under Inductor on a CPU, and everywhere on CUDA."""
