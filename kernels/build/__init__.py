"""Compiles kernels ahead of time with ninja, without a GPU."""
