"""Several processes that match and merge together, on torch.distributed."""

from mudsc_fast.distributed.ranks import DistributedError, Ranks

__all__ = ["DistributedError", "Ranks"]
