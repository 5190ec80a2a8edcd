"""Kernels in CUDA (csrc/cuda)."""
