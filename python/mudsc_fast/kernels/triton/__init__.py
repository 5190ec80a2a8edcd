"""Triton kernels, for CUDA tensors where triton can be imported."""
