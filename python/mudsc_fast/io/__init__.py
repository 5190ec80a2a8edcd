"""Networks in files: read lazily, merged or aligned tensor by tensor, written atomically."""

from mudsc_fast.checkpoints.checkpoint import Checkpoint, LazyTensors, open_checkpoint
from mudsc_fast.checkpoints.directory import Format
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.io.aligning import align_checkpoints
from mudsc_fast.io.merging import merge_checkpoints
from mudsc_fast.io.result import WriteResult
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
