from typing import Final

__version__: Final[str]
compiler: Final[str]
isa_levels: Final[tuple[str, ...]]
supported_isa: Final[int]
has_cuda: Final[bool]
