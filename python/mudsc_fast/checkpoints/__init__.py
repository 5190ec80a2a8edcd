"""Networks in files: opened, with common names for their tensors, and checked; read lazily, one tensor at a time."""
