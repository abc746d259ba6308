"""
The text of QMP, both ways: a bounded, incremental reader of JSON objects, and the writer of one line.

Sans-IO. This module knows where one JSON object ends and the next begins, nothing of what they mean. Newlines
are no framing in QMP (QEMU's C{qmp-spec}: a stream of JSON objects): the client of C{qemu.qmp} sends none,
people at a terminal send objects over several lines. So objects are found by their brackets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

JsonObject = dict[str, object]

MAX_DEPTH = 64
"""Nesting beyond this is refused before the JSON parser recurses into it. QMP's own needs are below 10."""

_WHITESPACE = re.compile(rb"[ \t\r\n]*")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRING = re.compile(rb'[^"\\\n]*(?:\\.[^"\\\n]*)*', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Malformed:
    """
    Something came that is no JSON object. Everything up to the next newline is skipped, then reading goes on.

    @ivar reason: what was wrong, fit for an operator.
    """

    reason: str


class QmpCodec:
    """
    Finds JSON objects in a stream of bytes, fed in any chunking.

    @ivar limit: longest object in bytes; the memory held is this and one chunk.
    """

    def __init__(self, limit: int = 1024 * 1024) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._scanned = 0
        self._depth = 0
        self._inString = False
        self._skipping = False

    def feed(self, data: bytes) -> list[JsonObject | Malformed]:
        """
        Take the next bytes.

        @return: what they completed, in order.
        """
        self._buffer += data
        found: list[JsonObject | Malformed] = []
        start = 0
        while True:
            if self._skipping:
                newline = self._buffer.find(b"\n", start)
                if newline < 0:
                    self._buffer.clear()
                    return found
                start = newline + 1
                self._reset()
            if not self._depth:
                start = self._scanned = _skipWhitespace(self._buffer, start)
            try:
                end = self._scan(min(len(self._buffer), start + self.limit))
                if end is None:
                    if len(self._buffer) - start < self.limit:
                        break
                    self._scanned = start + self.limit
                    raise ValueError(f"longer than {self.limit} bytes")
                found.append(_parse(self._buffer[start:end]))
                start = end
            except ValueError as error:
                found.append(Malformed(f"invalid JSON object: {error}"))
                start = self._scanned
                self._skipping = True
        del self._buffer[:start]
        self._scanned -= start
        return found

    def _scan(self, stop: int) -> int | None:
        """
        Go on looking for the end of the object that has begun.

        @param stop: where the bytes to look at end.
        @return: the position behind the object, or C{None} when it goes on beyond C{stop}.
        @raise ValueError: this cannot become an object.
        """
        buffer = self._buffer
        if not self._depth and self._scanned < stop and buffer[self._scanned] != ord("{"):
            raise ValueError(f"it starts with byte 0x{buffer[self._scanned]:02x}, not with a brace")
        while True:
            if self._inString:
                match = _STRING.match(buffer, self._scanned, stop)
                assert match is not None  # it matches the empty string
                self._scanned = match.end()
                if self._scanned == stop or buffer[self._scanned] == ord("\\"):
                    return None
                if buffer[self._scanned] == ord("\n"):
                    raise ValueError("newline in a string")
                self._inString = False
                self._scanned += 1
            match = _STRUCTURE.search(buffer, self._scanned, stop)
            if match is None:
                self._scanned = stop
                return None
            self._scanned = match.end()
            token = match.group()
            if token == b'"':
                self._inString = True
            elif token in b"{[":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise ValueError(f"nested deeper than {MAX_DEPTH}")
            else:
                self._depth -= 1
                if not self._depth:
                    return self._scanned


def encodeQmp(message: Mapping[str, object]) -> bytes:
    """
    One message as one line, the form every QMP reader understands.

    @raise TypeError: a value that JSON does not have.
    @raise ValueError: a number that JSON does not have (NaN, infinity).
    """
    return json.dumps(message, allow_nan=False, separators=(", ", ": ")).encode("ascii") + b"\r\n"


def _skipWhitespace(buffer: bytearray, start: int) -> int:
    match = _WHITESPACE.match(buffer, start)
    assert match is not None  # it matches the empty string
    return match.end()


def _refuseConstant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _parseFloat(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _parse(text: bytearray) -> JsonObject:
    """@raise ValueError: not JSON after all, in its encoding or in its grammar."""
    value = json.loads(text, parse_float=_parseFloat, parse_constant=_refuseConstant)
    assert isinstance(value, dict)  # it begins with a brace
    return value


__all__ = ["MAX_DEPTH", "JsonObject", "Malformed", "QmpCodec", "encodeQmp"]
