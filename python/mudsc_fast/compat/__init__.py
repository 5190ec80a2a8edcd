"""mudsc_fast by the interfaces of other libraries, a module for each; none of these libraries is imported."""

from mudsc_fast.compat import mudsc, pleas, rebasin, zipit
from mudsc_fast.compat.scipy import Patch, patch

__all__ = ["Patch", "mudsc", "patch", "pleas", "rebasin", "zipit"]
