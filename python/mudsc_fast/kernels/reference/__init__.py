"""Pure PyTorch kernels: short, slow, on any device; they define what is correct."""
