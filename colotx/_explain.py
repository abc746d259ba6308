"""
C{colo explain}: why two guests in lock-step needed checkpoints, as text for people.

A pure function of the answer of C{query-colotx-evidence} (L{colotx.evidence.Evidence.describe}).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from colotx._report import aligned, valueText

_LINE = 16
"""Bytes of each side shown."""


def explainText(evidence: Mapping[str, Any], last: int = 10) -> str:
    """
    @param evidence: the answer of C{query-colotx-evidence}.
    @param last: how many differences to show, the latest last.
    """
    if not evidence["reasons"]:
        return "The two guests said the same, as far as they were compared: no difference was seen."
    parts = [_counts("Reason", evidence["reasons"]), _counts("Guess", evidence["guesses"])]
    flows = [("Flow", "checkpoints")] + [
        (row["flow"], valueText(row["checkpoints"])) for row in evidence["flows"]
    ]
    if len(flows) > 1:
        parts.append(aligned(flows))
    shown = evidence["last"][-last:] if last else []
    parts += [_exhibit(exhibit) for exhibit in shown]
    return "\n\n".join(parts)


def _counts(title: str, counts: Mapping[str, int]) -> str:
    ordered: Sequence[tuple[str, int]] = sorted(counts.items(), key=lambda item: -item[1])
    return aligned([(title, "times"), *((name, valueText(count)) for name, count in ordered)])


def _exhibit(exhibit: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(exhibit["time"]).astimezone().strftime("%H:%M:%S.%f")[:-3]
    offset = "" if exhibit["offset"] is None else f" at byte {valueText(exhibit['offset'])}"
    rows = [(when, f"{exhibit['flow']} ({exhibit['direction']}){offset}")]
    rows.append(("", f"{exhibit['reason']}, probably: {exhibit['guess']}"))
    if exhibit["note"]:
        rows.append(("", exhibit["note"]))
    for side in ("primary", "secondary"):
        if exhibit[side]:
            rows.append(("", f"{side:<9} {_bytes(bytes.fromhex(exhibit[side]))}"))
    return aligned(rows)


def _bytes(data: bytes) -> str:
    shown = data[:_LINE]
    readable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in shown)
    return f"{shown.hex(' '):<{3 * _LINE - 1}}  {readable}"


__all__ = ["explainText"]
