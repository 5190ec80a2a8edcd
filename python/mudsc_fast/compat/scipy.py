"""scipy's assignment function, replaced in every module that uses it.

Most tools bind the function under a name of their own (``from scipy.optimize import linear_sum_assignment``), so that
replacing it in ``scipy.optimize`` alone would not reach them: every loaded module's own names are looked through, and
those of modules that are imported later.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor

from mudsc_fast.ops import assignment

_HOME = "scipy.optimize"
_NAME = "linear_sum_assignment"


def _replacement(cost_matrix: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Solve the linear sum assignment problem: mudsc_fast in the place of scipy.optimize.linear_sum_assignment."""
    rows, columns = assignment.linear_sum_assignment(cost_matrix, maximize)
    # scipy answers tensors, which it reads as arrays, with arrays.
    return (rows.cpu().numpy(), columns.cpu().numpy()) if isinstance(rows, Tensor) else (rows, columns)


_replacement.__name__ = _NAME  # but not its qualified name, by which it is pickled


class Patch:
    """One request to use mudsc_fast in scipy's place; made by :func:`patch`, and in force until it is restored."""

    def __init__(self, only: Sequence[str] | None) -> None:
        self._only = None if only is None else tuple(only)
        self._patched: dict[str, None] = {}
        self._entered = 0
        _switch.add(self)

    def __repr__(self) -> str:
        return f"<mudsc_fast.patch of {'all modules' if self._only is None else ', '.join(self._only)}>"

    def __enter__(self) -> Patch:
        self._entered += 1
        _switch.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            self.restore()

    @property
    def active(self) -> bool:
        """Whether this patch is in force."""
        return _switch.holds(self)

    @property
    def patched(self) -> tuple[str, ...]:
        """The names replaced so far, as ``module.name``; modules imported while the patch is active join in."""
        return tuple(self._patched)

    def restore(self) -> None:
        """Put scipy's function back wherever no other active patch replaces it; a second call changes nothing."""
        _switch.remove(self)

    def report(self) -> str:
        """Return what was replaced, a line for each name."""
        state = "active" if self.active else "restored"
        lines = [f"{_HOME}.{_NAME} -> mudsc_fast in {len(self._patched)} places ({state})", *self._patched]
        return "\n  ".join(lines)

    def covers(self, module: str) -> bool:
        """Return whether names of that module are to be replaced."""
        return self._only is None or any(module == name or module.startswith(f"{name}.") for name in self._only)

    def note(self, place: str) -> None:
        """Add a name to those that were replaced."""
        self._patched[place] = None


def patch(only: Sequence[str] | None = None) -> Patch:
    """Use mudsc_fast wherever Python code calls ``scipy.optimize.linear_sum_assignment``.

    In force from the call on, until the end of a ``with`` block or until :meth:`Patch.restore`::

        with mudsc_fast.patch() as patched:
            rebasin.PermutationCoordinateDescent(model_a, model_b, batch).rebasin()
        print(patched.report())

    Replaced are all names of loaded modules that are bound to that very function, and those of modules imported
    meanwhile; scipy need not be installed. Patches may be nested, overlap and be used from several threads: a name is
    restored with the last patch that covers it, and only if nobody else has bound it anew. Functions kept elsewhere (as
    default argument, attribute of an object or in a closure) are not found.

    Parameters
    ----------
    only
        Names of modules or packages to patch, e.g. ``["rebasin"]``; by default all, ``scipy.optimize`` among them. Add
        that one where a package looks the function up there at each call.

    Raises
    ------
    TypeError
        If `only` is not a sequence of names.

    Notes
    -----
    Results are those of :func:`mudsc_fast.linear_sum_assignment`: optimal, and of several optimal assignments the one
    that scipy chooses for up to 128 rows or columns; beyond, perhaps another.
    """
    if only is not None and (
        isinstance(only, str) or not isinstance(only, Sequence) or not all(isinstance(name, str) for name in only)
    ):
        raise TypeError(f"only must be a sequence of module names, got {only!r}")
    return Patch(only)


class _Switch(MetaPathFinder):
    """All active patches, the names they replaced, and the finder that sees modules being imported."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._active: list[Patch] = []
        self._original: Callable[..., Any] | None = None
        self._replaced: dict[tuple[int, str], tuple[str, dict[str, Any]]] = {}
        self._followed: dict[int, tuple[Any, Any]] = {}  # loaders by id, with an `exec_module` of their own if any
        self._searching = threading.local()

    def holds(self, patch: Patch) -> bool:
        with self._lock:
            return patch in self._active

    def add(self, patch: Patch) -> None:
        with self._lock:
            if patch in self._active:
                return
            if not self._active:
                sys.meta_path.insert(0, self)
                self._find_original()
            self._active.append(patch)
            self._replace_everywhere()

    def remove(self, patch: Patch) -> None:
        with self._lock:
            if patch not in self._active:
                return
            self._active.remove(patch)
            # Beyond what was replaced, a module may have imported the replacement from one that was.
            for module, names in _namespaces():
                for name in [name for name, value in names.copy().items() if value is _replacement]:
                    self._replaced.setdefault((id(names), name), (module, names))
            for key, (module, names) in list(self._replaced.items()):
                if not any(other.covers(module) for other in self._active):
                    del self._replaced[key]
                    if names.get(key[1]) is _replacement:
                        names[key[1]] = self._original
            if not self._active:
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                self._unfollow()
                self._original = None

    def imported(self, module: ModuleType) -> None:
        """Replace the names of a module that has just been executed."""
        with self._lock:
            if not self._active:
                return
            if self._original is None:
                self._find_original()
                self._replace_everywhere()
            else:
                self._replace_in(module.__name__, vars(module))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module by the other finders, and have it patched once it is executed."""
        names: set[str] = self._searching.__dict__.setdefault("names", set())
        if fullname in names:  # asked by another finder that asks all finders in turn
            return None
        names.add(fullname)
        try:
            spec = _find_by_others(self, fullname, path, target)
        finally:
            names.remove(fullname)
        # Loaders that are classes, those of built-in modules, are shared: they stay as they are.
        if spec is not None and hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, type):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Have the modules that a loader executes patched, until the last patch ends."""
        with self._lock:
            if not self._active or id(loader) in self._followed or not hasattr(loader, "__dict__"):
                return
            execute = loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                self.imported(module)

            self._followed[id(loader)] = (loader, loader.__dict__.get("exec_module"))
            # On the loader itself, not around it: others compare loaders and ask them for sources and resources.
            loader.__dict__["exec_module"] = execute_and_patch

    def _unfollow(self) -> None:
        for loader, own in self._followed.values():
            if own is None:
                del loader.__dict__["exec_module"]
            else:
                loader.__dict__["exec_module"] = own
        self._followed.clear()

    def _find_original(self) -> None:
        home = sys.modules.get(_HOME)
        self._original = None if home is None else vars(home).get(_NAME)

    def _replace_everywhere(self) -> None:
        for module, names in _namespaces():
            self._replace_in(module, names)

    def _replace_in(self, module: str, names: dict[str, Any]) -> None:
        patches = [patch for patch in self._active if patch.covers(module)]
        if self._original is None or not patches:
            return
        for name, value in names.copy().items():
            if value is self._original or value is _replacement:
                names[name] = _replacement
                self._replaced[id(names), name] = (module, names)
                for patch in patches:
                    patch.note(f"{module}.{name}")


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and namespace of every loaded module, without waking modules that load themselves lazily."""
    for module, value in sys.modules.copy().items():
        if isinstance(value, ModuleType) and module.partition(".")[0] != "mudsc_fast":
            yield module, vars(value)


def _find_by_others(
    own: MetaPathFinder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in sys.meta_path.copy():
        find_spec = getattr(finder, "find_spec", None)
        if finder is not own and find_spec is not None:
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                return spec
    return None


_switch = _Switch()
