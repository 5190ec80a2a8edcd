"""Networks in files: read lazily, merged or aligned tensor by tensor, written all or nothing."""

from mudsc_fast.io.checkpoint import Checkpoint, CheckpointError, Format, LazyTensors, open_checkpoint
from mudsc_fast.io.merging import WriteResult, align_checkpoints, merge_checkpoints
from mudsc_fast.io.writing import TensorSize, Written, atomic_path, write_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Format",
    "LazyTensors",
    "TensorSize",
    "WriteResult",
    "Written",
    "align_checkpoints",
    "atomic_path",
    "merge_checkpoints",
    "open_checkpoint",
    "write_checkpoint",
]
