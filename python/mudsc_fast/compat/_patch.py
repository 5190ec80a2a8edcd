"""Assignment functions of other libraries, replaced in every module that uses them.

Most tools bind such a function to a name of their own (``from scipy.optimize import linear_sum_assignment``), so
replacing it in its library would not reach them. Instead, the names of all loaded modules are searched for the function
itself, and those of modules that are imported later.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from mudsc_fast.compat._replacements import ORIGINALS, REPLACEMENTS

_NAMES = tuple(replacement.name for replacement in REPLACEMENTS)


class Patch:
    """One request to use mudsc_fast in other libraries, made by :func:`patch`; active until it is restored."""

    def __init__(self, only: Sequence[str] | None, functions: Sequence[str] | None) -> None:
        self._only = None if only is None else tuple(only)
        self._functions = None if functions is None else frozenset(functions)
        self._patched: dict[str, str] = {}
        self._entered = 0
        _switch.add(self)

    def __repr__(self) -> str:
        where = "all modules" if self._only is None else ", ".join(self._only)
        which = "" if self._functions is None else f": {', '.join(sorted(self._functions))}"
        return f"<mudsc_fast.patch of {where}{which}>"

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
        """Whether this patch is active."""
        return _switch.holds(self)

    @property
    def patched(self) -> tuple[str, ...]:
        """The names replaced so far, as ``module.name``, including those of modules imported since."""
        return tuple(self._patched)

    def restore(self) -> None:
        """Restore the original functions wherever no other active patch replaces them; may be called again."""
        _switch.remove(self)

    def report(self) -> str:
        """Return what was replaced: a line for each function, and below it the names that were bound to it."""
        state = "active" if self.active else "restored"
        lines = [f"mudsc_fast.patch ({state}): {len(self._patched)} names replaced"]
        for function in dict.fromkeys(self._patched.values()):
            places = [place for place, bound in self._patched.items() if bound == function]
            lines += [f"  {function} -> mudsc_fast in {len(places)} places", *(f"    {place}" for place in places)]
        return "\n".join(lines)

    def covers(self, module: str, function: str) -> bool:
        """Return whether names of that module that are bound to the function are to be replaced."""
        if self._functions is not None and function not in self._functions:
            return False
        return self._only is None or any(module == name or module.startswith(f"{name}.") for name in self._only)

    def note(self, place: str, function: str) -> None:
        """Record a replaced name."""
        self._patched[place] = function


def patch(only: Sequence[str] | None = None, *, functions: Sequence[str] | None = None) -> Patch:
    """Use mudsc_fast wherever Python code calls an assignment function of scipy, lap, lapjv and other libraries.

    Active from the call until the end of a ``with`` block or until :meth:`Patch.restore`::

        with mudsc_fast.patch() as patched:
            rebasin.PermutationCoordinateDescent(model_a, model_b, batch).rebasin()
        print(patched.report())

    All names of loaded modules that are bound to one of these very functions are replaced, and those of modules
    imported in the meantime; none of the libraries need be installed. Patches may be nested, overlap and be used from
    several threads: a name is restored with the last patch that covers it, and only if nobody else has rebound it.
    Functions kept elsewhere (as a default argument, an attribute of an object or in a closure) are not found.

    Parameters
    ----------
    only
        Names of modules or packages to patch, e.g. ``["rebasin"]``; by default all, including the libraries
        themselves. Add a library where a package looks its function up at each call.
    functions
        Names of functions to replace, e.g. ``["lap.lapjv"]``; by default all of: ``scipy.optimize``'s
        ``linear_sum_assignment``; ``lap.lapjv``, ``lapjvx``, ``lapjvxa``, ``lapjvx_batch``, ``lapjvxa_batch``,
        ``lapmod``; ``lapjv.lapjv``; ``lapsolver.solve_dense``; ``torch_linear_assignment.batch_linear_assignment``,
        ``assignment_to_indices``; ``torch_lap_cuda.solve_lap``; ``optax.assignment.hungarian_algorithm``.

    Raises
    ------
    TypeError
        If `only` or `functions` is not a sequence of names.
    ValueError
        If `functions` names a function that is not replaced, or `only` a module that is neither loaded nor found.

    Notes
    -----
    Results are those of the functions in :mod:`mudsc_fast.compat`: optimal, and of several optimal assignments the one
    that scipy chooses for up to 128 rows or columns; beyond, it may be another.
    """
    _check_names("only", "module names", only)
    _check_names("functions", "function names", functions)
    unknown = [name for name in functions or () if name not in _NAMES]
    if unknown:
        raise ValueError(f"functions must be among {', '.join(_NAMES)}; got {unknown[0]!r}")
    for name in only or ():
        if not _exists(name):
            raise ValueError(
                f"only must name modules that are loaded or can be imported, got {name!r}, which is neither"
            )
    return Patch(only, functions)


def _exists(module: str) -> bool:
    """Tell whether a module is loaded or can be found, without importing anything."""
    if any(name == module or name.startswith(f"{module}.") for name in list(sys.modules)):
        return True
    package = module.rpartition(".")[0]
    if package and package not in sys.modules:
        return _exists(package)  # finding a submodule would import its package
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of names that cannot be those of modules
        return False


def _check_names(argument: str, kind: str, names: object) -> None:
    is_names = (
        isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
    )
    if names is not None and not is_names:
        raise TypeError(f"{argument} must be a sequence of {kind}, got {names!r}")


@dataclass(frozen=True, eq=False)
class _Found:
    """A function that was found in its library."""

    name: str
    original: Callable[..., Any]
    replacement: Callable[..., Any]


class _Switch(MetaPathFinder):
    """All active patches, the names they replaced, and the finder that sees modules being imported."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._active: list[Patch] = []
        self._found: dict[str, _Found] = {}
        # By the id of the original and of the replacement, both of which `_found` keeps alive.
        self._by_id: dict[int, _Found] = {}
        self._replaced: dict[tuple[int, str], tuple[str, dict[str, Any], _Found]] = {}
        self._followed: dict[int, tuple[Any, Any]] = {}  # loaders by id, with their own `exec_module` if they have one
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
            self._find_originals()
            self._active.append(patch)
            self._replace_everywhere()

    def remove(self, patch: Patch) -> None:
        with self._lock:
            if patch not in self._active:
                return
            self._active.remove(patch)
            # A module may also have imported a replacement from a module where it was replaced.
            for module, names in _namespaces():
                for name, value in names.copy().items():
                    found = self._by_id.get(id(value))
                    if found is not None and value is found.replacement:
                        self._replaced.setdefault((id(names), name), (module, names, found))
            for key, (module, names, found) in list(self._replaced.items()):
                if not any(other.covers(module, found.name) for other in self._active):
                    del self._replaced[key]
                    if names.get(key[1]) is found.replacement:
                        names[key[1]] = found.original
            if not self._active:
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                self._unfollow()
                self._found.clear()
                self._by_id.clear()
                ORIGINALS.clear()

    def imported(self, module: ModuleType) -> None:
        """Replace the names of a module that has just been executed."""
        with self._lock:
            if not self._active:
                return
            if self._find_originals():
                self._replace_everywhere()
            else:
                self._replace_in(module.__name__, vars(module))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module by the other finders, and patch it once it is executed."""
        names: set[str] = self._searching.__dict__.setdefault("names", set())
        if fullname in names:  # called by another finder that queries all finders
            return None
        names.add(fullname)
        try:
            spec = _find_by_others(self, fullname, path, target)
        finally:
            names.remove(fullname)
        # Loaders that are classes (of built-in modules) are shared and left unchanged.
        if spec is not None and hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, type):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Patch the modules that a loader executes, until the last patch ends."""
        with self._lock:
            if not self._active or id(loader) in self._followed or not hasattr(loader, "__dict__"):
                return
            execute = loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                self.imported(module)

            self._followed[id(loader)] = (loader, loader.__dict__.get("exec_module"))
            # Changes the loader itself instead of wrapping it, because others compare loaders and ask them for sources.
            loader.__dict__["exec_module"] = execute_and_patch

    def _unfollow(self) -> None:
        for loader, own in self._followed.values():
            if own is None:
                del loader.__dict__["exec_module"]
            else:
                loader.__dict__["exec_module"] = own
        self._followed.clear()

    def _find_originals(self) -> bool:
        """Look for functions in libraries that have been loaded since; return whether there was one."""
        before = len(self._found)
        for wanted in REPLACEMENTS:
            for module, name in wanted.homes if wanted.name not in self._found else ():
                loaded = sys.modules.get(module)
                original = vars(loaded).get(name) if isinstance(loaded, ModuleType) else None
                if callable(original) and original is not wanted.function:
                    found = _Found(wanted.name, original, wanted.function)
                    self._found[wanted.name] = found
                    ORIGINALS[wanted.name] = original
                    self._by_id[id(original)] = self._by_id[id(found.replacement)] = found
                    break
        return len(self._found) > before

    def _replace_everywhere(self) -> None:
        for module, names in _namespaces():
            self._replace_in(module, names)

    def _replace_in(self, module: str, names: dict[str, Any]) -> None:
        for name, value in names.copy().items():
            found = self._by_id.get(id(value))
            if found is None:
                continue
            patches = [patch for patch in self._active if patch.covers(module, found.name)]
            if not patches:
                continue
            names[name] = found.replacement
            self._replaced[id(names), name] = (module, names, found)
            for patch in patches:
                patch.note(f"{module}.{name}", found.name)


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and namespace of every loaded module, without triggering lazy modules."""
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
