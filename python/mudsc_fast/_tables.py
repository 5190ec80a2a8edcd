"""Tables of results, as text and for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mudsc_fast.matching.node import NodeMatching

Row = Sequence[str]
_HEADER = ("node", "units", "similarity before", "after")


def node_rows(nodes: Mapping[str, NodeMatching]) -> list[Row]:
    """Return the rows of the table of nodes, the header first."""
    rows: list[Row] = [_HEADER]
    for node, match in nodes.items():
        rows.append((node, str(match.num_clusters), f"{match.similarity_before:.4f}", f"{match.similarity:.4f}"))
    return rows


def as_text(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Return a table with its first column flush left, and lines below it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def as_html(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Return the same for a notebook."""
    from html import escape  # takes a millisecond to import, and only notebooks need it

    header, *body = rows
    parts = ["<table><thead><tr>", *(f"<th>{escape(cell)}</th>" for cell in header), "</tr></thead><tbody>"]
    for row in body:
        parts += ["<tr>", *(f"<td>{escape(cell)}</td>" for cell in row), "</tr>"]
    parts.append("</tbody></table>")
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    return "".join(parts)
