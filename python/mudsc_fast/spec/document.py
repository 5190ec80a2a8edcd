"""Specifications as JSON documents. Fields have the names of the Python arguments and attributes.

::

    {
      "format": "mudsc_fast.PermutationSpec",
      "version": 1,
      "tensors": {"fc1.weight": ["hidden", null], "fc2.weight": [null, "hidden"]},
      "groups": {"hidden": {"count": 2, "tie": "heads"}},
      "observe": {"hidden": [{"module": "fc2"}]}
    }

An axis is the name of a node, null, an object with the fields of :class:`Axis`, or a list of windows: objects with
``width`` and ``axis``. Fields at their default are left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from mudsc_fast.spec.axes import Axis, Entry, Layout, Segment, Window
from mudsc_fast.spec.groups import Groups
from mudsc_fast.spec.observation import Observation

FORMAT = "mudsc_fast.PermutationSpec"
VERSION = 1

_Record = TypeVar("_Record", Axis, Groups, Observation)


def to_json(
    layouts: Mapping[str, Layout], observations: Mapping[str, Sequence[Observation]], groups: Mapping[str, Groups]
) -> str:
    """Return a document that :func:`from_json` reads."""
    tensors = {
        tensor: [_axis_to_json(position, segments) for position, segments in enumerate(layout)]
        for tensor, layout in layouts.items()
    }
    proper = {node: _fields(grouped) for node, grouped in groups.items() if grouped != Groups(1)}
    observe = {node: [_fields(observation) for observation in where] for node, where in observations.items()}
    parts: dict[str, Mapping[str, object]] = {"tensors": tensors, "groups": proper, "observe": observe}
    # One line per tensor and node. The indentation of `json` would put every number on a line of its own.
    lines = [f'  "format": {json.dumps(FORMAT)}', f'  "version": {VERSION}']
    for name, entries in parts.items():
        rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        lines.append(f'  "{name}": {{\n{rows}\n  }}' if rows else f'  "{name}": {{}}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str) -> tuple[dict[str, list[Entry]], dict[str, list[Observation]], dict[str, Groups]]:
    """Return the axes map, the observations and the groups in a document: the arguments of a specification.

    Raises
    ------
    ValueError
        If the text is not JSON, or a field is missing, unknown, out of range or of another type. The message names
        the field, what was expected and what was found.
    """
    try:
        document = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"specification must be JSON, got an error at line {error.lineno}: {error.msg}") from None
    _check_type("specification", document, dict, "an object")
    if document.get("format") != FORMAT:
        raise ValueError(f"format must be {FORMAT!r}, got {document.get('format')!r}")
    if document.get("version") != VERSION or document.get("version") is True:
        raise ValueError(f"version must be {VERSION}, got {document.get('version')!r}")
    _check_names("specification", document, ("format", "version", "tensors", "groups", "observe"), ("tensors",))
    axes = {
        tensor: [_read_axis(f"tensors[{tensor!r}][{i}]", value) for i, value in enumerate(entries)]
        for tensor, entries in _read_mapping("tensors", document["tensors"], list, "a list")
    }
    groups = {
        node: _read_record(f"groups[{node!r}]", value, Groups)
        for node, value in _read_mapping("groups", document.get("groups", {}), dict, "an object")
    }
    observe = {
        node: [_read_record(f"observe[{node!r}][{i}]", value, Observation) for i, value in enumerate(values)]
        for node, values in _read_mapping("observe", document.get("observe", {}), list, "a list")
    }
    return axes, observe, groups


def _axis_to_json(position: int, segments: Sequence[Segment]) -> object:
    if segments[0].width is None:
        return _entry_to_json(position, segments[0].axis)
    return [{"width": segment.width, "axis": _entry_to_json(position, segment.axis)} for segment in segments]


def _entry_to_json(position: int, axis: Axis | None) -> object:
    if axis is None:
        return None
    plain = Axis(axis.node, "produce" if position == 0 else "consume")
    return axis.node if axis == plain else _fields(axis)


def _fields(record: Axis | Groups | Observation) -> dict[str, object]:
    """Return the fields that differ from their default."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {f.name: values[f.name] for f in dataclasses.fields(record) if values[f.name] != f.default}


def _read_axis(where: str, value: object) -> Entry:
    if not isinstance(value, list):
        return _read_entry(where, value)
    if not value:
        raise ValueError(f"{where} must have at least one window, got none")
    windows = []
    for index, window in enumerate(value):
        place = f"{where}[{index}]"
        _check_type(place, window, dict, "an object")
        _check_names(place, window, ("width", "axis"), ("width",))
        _check_type(f"{place}.width", window["width"], int, "an integer")
        axis = _read_entry(f"{place}.axis", window.get("axis"))
        windows.append(_located(place, partial(Window, axis, window["width"])))
    return windows


def _read_entry(where: str, value: object) -> str | Axis | None:
    if value is None or isinstance(value, str):
        return value
    _check_type(where, value, dict, "the name of a node, an object or null")
    return _read_record(where, value, Axis)


def _read_record(where: str, value: Any, kind: type[_Record]) -> _Record:
    """Return an instance of a dataclass, after checking its fields by their annotations."""
    _check_type(where, value, dict, "an object")
    fields = dataclasses.fields(kind)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    _check_names(where, value, [field.name for field in fields], needed)
    for field in fields:
        if field.name in value and not (value[field.name] is None and "None" in str(field.type)):
            expected, described = _TYPES[str(field.type).removesuffix(" | None")]
            _check_type(f"{where}.{field.name}", value[field.name], expected, described)
    return _located(where, partial(kind, **value))


_TYPES: Mapping[str, tuple[type, str]] = {
    "str": (str, "a string"),
    "int": (int, "an integer"),
    "bool": (bool, "true or false"),
    "Role": (str, "a string"),
    "Port": (str, "a string"),
}

_Built = TypeVar("_Built")


def _located(where: str, build: Callable[[], _Built]) -> _Built:
    try:
        return build()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_mapping(where: str, value: object, kind: type, described: str) -> list[tuple[str, Any]]:
    _check_type(where, value, dict, "an object")
    assert isinstance(value, dict)
    for name, entry in value.items():
        _check_type(f"{where}[{name!r}]", entry, kind, described)
    return list(value.items())


def _check_type(where: str, value: object, kind: type, described: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {described}, got {json.dumps(value)[:80]}")


def _check_names(where: str, value: Mapping[str, object], known: Sequence[str], needed: Sequence[str]) -> None:
    for name in needed:
        if name not in value:
            raise ValueError(f"{where} must have the field {name!r}, got {sorted(value)}")
    for name in value:
        if name not in known:
            raise ValueError(f"{where} must have no fields other than {', '.join(known)}, got {name!r}")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"every field must occur only once, got {name!r} twice")
        found[name] = value
    return found
