"""Networks in files: opening, checking, and giving tensors common names. Tensors are read lazily, one at a time."""
