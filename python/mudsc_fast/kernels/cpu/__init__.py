"""Kernels in C++ (csrc/cpu), called with addresses and sizes."""
