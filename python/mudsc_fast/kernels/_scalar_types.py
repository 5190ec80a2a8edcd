"""Numbers that represent dtypes in C++ and CUDA kernels."""

from __future__ import annotations

import torch

#: The values of mudsc::ScalarType (csrc/include/mudsc/types.hpp).
SCALAR_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
