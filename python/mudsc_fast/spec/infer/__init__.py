"""Derivation of specifications: type inference on the axes of tensors, over the exported graph of a model.

`factors` is the algebra of axes, `views` follows data movement, `operators` has the rule of each ATen operator,
`graph` reads an exported model, `nodes` and `places` turn the result into the arguments of a specification, and
`derivation` puts all together.
"""

from mudsc_fast.spec.infer.derivation import Derivation, derive
from mudsc_fast.spec.infer.record import Obstacle

__all__ = ["Derivation", "Obstacle", "derive"]
