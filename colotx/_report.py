"""
What the daemon answers, as text for people: aligned, with since when, why, and what to do.

Pure functions of the answers of C{query-colotx-status} and C{query-colotx-stats}; members this file does not know
are shown too, under their own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime

WHAT_TO_DO = {
    "protected": "nothing",
    "resyncing": "wait: it is protected when the peer holds the first checkpoint",
    "degraded": "decide: bring the peer back, or, when its host is dead for certain: colo failover",
    "unprotected": "start the peer's daemon or repair what is said under Why; until then nothing may fail",
}
"""The operator's next step, by status."""

_LABELS = {"vm": "VM", "if-peer-dies": "If the peer dies"}
_ORDER = ("vm", "role", "guest", "run-state", "status", "why", "if-peer-dies", "peer", "epoch")


def statusText(status: Mapping[str, object]) -> str:
    """@param status: the answer of C{query-colotx-status}."""
    word = str(status.get("status", "unknown"))
    rows = []
    known = [name for name in _ORDER if name in status]
    for name in [*known, *(name for name in status if name not in (*_ORDER, "since", "seconds"))]:
        text = f"{word}{_since(status)}" if name == "status" else valueText(status[name])
        rows.append((_label(name), text))
    rows.append(("What to do", WHAT_TO_DO.get(word, "see the daemon's log")))
    return aligned(rows)


def statisticsText(statistics: Mapping[str, object]) -> str:
    """@param statistics: the answer of C{query-colotx-stats}. Members that are tables are shown as such."""
    rows = []
    tables = []
    for name, value in statistics.items():
        columns = _columns(value)
        if columns is None:
            rows.append((_label(name), valueText(value)))
        else:
            assert isinstance(value, Mapping)
            body = [(row, *(valueText(cells[column]) for column in columns)) for row, cells in value.items()]
            tables.append(aligned([(_label(name), *columns), *body], right=True))
    return "\n\n".join(([aligned(rows)] if rows else []) + tables)


def aligned(rows: Iterable[Sequence[str]], right: bool = False) -> str:
    """
    Columns of equal width.

    @param right: whether all but the first column are aligned to the right.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def durationText(seconds: float) -> str:
    """The two largest units: C{3 d 4 h}, C{2 min 5 s}, C{1.5 s}."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest = round(seconds)
    parts: list[str] = []
    for name, size in units:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def valueText(value: object) -> str:
    """One value on one line."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {valueText(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(valueText, value)) or "none"
    return str(value)


def _label(name: str) -> str:
    return _LABELS.get(name) or name[:1].upper() + name[1:].replace("-", " ")


def _since(status: Mapping[str, object]) -> str:
    text = ""
    seconds, since = status.get("seconds"), status.get("since")
    if isinstance(seconds, int | float):
        text += f" for {durationText(seconds)}"
    if isinstance(since, str):
        with suppress(ValueError):  # what is no time is shown as it is
            since = datetime.fromisoformat(since).strftime("%Y-%m-%d %H:%M:%S %Z").rstrip()
        text += f", since {since}"
    return text


def _columns(value: object) -> list[str] | None:
    """The columns of a mapping of equal mappings, or C{None} when it is something else."""
    if not isinstance(value, Mapping) or not value:
        return None
    rows = list(value.values())
    if not all(isinstance(row, Mapping) and list(row) == list(rows[0]) for row in rows):
        return None
    return list(rows[0])


__all__ = ["WHAT_TO_DO", "aligned", "durationText", "statisticsText", "statusText", "valueText"]
