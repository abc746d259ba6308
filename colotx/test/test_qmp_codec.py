"""The QMP codec: every chunking, garbage, oversize."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.qmp import Malformed, QmpCodec, encodeQmp

BOUNDED = settings(max_examples=150, deadline=None)

_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), _values, max_size=4)
_renderings = st.sampled_from(
    [
        encodeQmp,
        lambda value: json.dumps(value).encode(),
        lambda value: b" " + json.dumps(value, indent=2, ensure_ascii=True).encode() + b"\t",
    ]
)


def _chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def _feedAll(codec: QmpCodec, chunks: list[bytes]) -> list[Any]:
    return [message for chunk in chunks for message in codec.feed(chunk)]


class CodecTests(SynchronousTestCase):
    """L{QmpCodec} and L{encodeQmp}."""

    @BOUNDED
    @given(st.lists(st.tuples(objects, _renderings), max_size=5), st.lists(st.integers(0), max_size=12))
    def test_identity(self, messages: list[Any], cuts: list[int]) -> None:
        """What was written is read back, whatever stands between the objects and wherever the stream is cut."""
        data = b"".join(render(message) for message, render in messages)
        self.assertEqual(_feedAll(QmpCodec(), _chunks(data, cuts)), [message for message, _ in messages])

    @BOUNDED
    @given(
        st.lists(
            st.binary(max_size=12)
            | st.sampled_from([b"{", b"}", b'"', b"\\", b"\n", b"[", b"]", b'{"a": 1}', b"{}"])
        ),
        st.lists(st.integers(0), max_size=12),
    )
    def test_garbage(self, pieces: list[bytes], cuts: list[int]) -> None:
        """Any bytes give objects and complaints, the same under every chunking; what is kept is bounded."""
        data = b"".join(pieces)
        codec = QmpCodec(limit=20)
        chunked = []
        for chunk in _chunks(data, cuts):
            chunked += codec.feed(chunk)
            self.assertLess(len(codec._buffer), 20)
        self.assertEqual(chunked, QmpCodec(limit=20).feed(data))
        for message in chunked:
            self.assertIsInstance(message, dict | Malformed)

    def test_oversize(self) -> None:
        """An object of the limit passes, a longer one is refused as soon as it is; reading goes on behind it."""
        text = b'{"a": "' + b"x" * 91 + b'"}'
        self.assertEqual(QmpCodec(limit=100).feed(text), [{"a": "x" * 91}])
        codec = QmpCodec(limit=99)
        self.assertEqual(
            codec.feed(text + b"\n{}"), [Malformed("invalid JSON object: longer than 99 bytes"), {}]
        )
        codec = QmpCodec(limit=99)
        self.assertEqual(len(codec.feed(b'{"a": "' + b"x" * 1000)), 1)
        self.assertEqual(codec.feed(b"y" * 1000), [])
        self.assertEqual(codec.feed(b'y"}\n{}'), [{}])
        codec = QmpCodec(limit=10)
        self.assertEqual(codec.feed(b'{"a": "xx'), [])
        self.assertEqual(len(codec.feed(b"x")), 1)

    def test_deep(self) -> None:
        """Nesting that would exhaust the JSON parser's stack is refused."""
        [message] = QmpCodec().feed(b'{"a": ' + b"[" * 100_000)
        self.assertEqual(message, Malformed("invalid JSON object: nested deeper than 64"))

    def test_reasons(self) -> None:
        """Complaints say what is wrong."""
        for text, reason in [
            (b"hello\n", "starts with byte 0x68"),
            (b'{"a\n', "newline in a string"),
            (b'{"a": NaN}\n', "NaN"),
            (b"{'a': 1}\n", "double quotes"),
            (b'{"a": "\xff"}\n', "utf-8"),
            (b'{"a": 1]\n', "delimiter"),
            (b'{"a": -1e999}\n', "too large"),
            (b'{"a": ' + b"1" * 5000 + b"}\n", "digits"),
        ]:
            message, rest = QmpCodec().feed(text + b'{"b": 2}')
            assert isinstance(message, Malformed)
            self.assertIn(reason, message.reason)
            self.assertEqual(rest, {"b": 2})

    def test_encode(self) -> None:
        """One line, ASCII only, and nothing JSON does not have."""
        self.assertEqual(encodeQmp({"a": "ü\n", "b": [True]}), b'{"a": "\\u00fc\\n", "b": [true]}\r\n')
        self.assertRaises(ValueError, encodeQmp, {"a": float("nan")})
        self.assertRaises(TypeError, encodeQmp, {"a": b"bytes"})
