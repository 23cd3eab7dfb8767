"""Kernels that are found compiled instead of being compiled."""
