"""Triton kernels, for CUDA tensors where Triton can be used (kernels/_triton.py)."""
