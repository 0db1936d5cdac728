"""Vectors of float32 for numba kernels on the CPU."""
