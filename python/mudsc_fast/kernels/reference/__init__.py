"""Pure PyTorch kernels: short, slow, on any device. They define the correct results."""
