"""
Tests for L{colotx.hello}.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import HelloRefused, OversizeError, PeerError, ProtocolError
from colotx.hello import HEARTBEAT, MAX_EPOCH, MAX_FRAME, PROTOCOL, FrameDecoder, Hello, encodeFrame

HELLO = Hello("web", "primary", str(uuid4()), 7, "active", True, str(uuid4()))

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_messages = st.dictionaries(st.text(), _json, max_size=4)


def frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


class FrameTests(SynchronousTestCase):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(_messages, max_size=5), st.lists(st.integers(0, 200), max_size=6))
    def test_anyChunking(self, messages, cuts):
        """Frames come out as they went in, in whatever pieces; heartbeats between them do not show."""
        stream = HEARTBEAT.join(encodeFrame(message) for message in messages) + HEARTBEAT
        decoder, seen, start = FrameDecoder(), [], 0
        for end in [*sorted(min(cut, len(stream)) for cut in cuts), len(stream)]:
            seen += decoder.feed(stream[start:end])
            start = end
        self.assertEqual(seen, messages)

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=200))
    def test_anyBytes(self, data):
        """Whatever comes, it is a message, a clean wait or a L{ProtocolError}."""
        try:
            for message in FrameDecoder().feed(data):
                self.assertIsInstance(message, dict)
        except ProtocolError:
            pass

    def test_bytewise(self):
        decoder, seen = FrameDecoder(), []
        for byte in encodeFrame({"a": 1}) + HEARTBEAT + encodeFrame({"b": 2}):
            seen += decoder.feed(bytes([byte]))
        self.assertEqual(seen, [{"a": 1}, {"b": 2}])

    def test_limit(self):
        """A frame of exactly the limit passes both ways, one more byte in neither."""
        message = {"x": "y" * (MAX_FRAME - len('{"x":""}'))}
        self.assertEqual(FrameDecoder().feed(encodeFrame(message)), [message])
        message["x"] += "y"
        self.assertRaises(OversizeError, encodeFrame, message)
        self.assertRaises(OversizeError, FrameDecoder().feed, struct.pack(">I", MAX_FRAME + 1))

    def test_noObject(self):
        for payload in b"[]", b"1", b"null", b'"x"', b"{", b"\xff\xfe", b"[" * 60000:
            error = self.assertRaises(ProtocolError, FrameDecoder().feed, frame(payload))
            self.assertIn("no JSON", str(error))


class HelloTests(SynchronousTestCase):
    def test_roundTrip(self):
        (message,) = FrameDecoder().feed(encodeFrame(HELLO.toMessage()))
        self.assertEqual(Hello.fromMessage(message), HELLO)

    def test_unknownFields(self):
        """A later version may say more."""
        self.assertEqual(Hello.fromMessage({**HELLO.toMessage(), "compression": "lz4"}), HELLO)

    def test_version(self):
        """The version is judged before the fields, which another version may have changed."""
        for version in PROTOCOL + 1, 0, None, "1", True + 1:
            message = {"type": "hello", "protocol": version}
            error = self.assertRaises(HelloRefused, Hello.fromMessage, message)
            self.assertIn(f"version {version}", error.reason)

    def test_notAHello(self):
        error = self.assertRaises(HelloRefused, Hello.fromMessage, {"type": "bye"})
        self.assertIn("'bye' before its hello", str(error))

    def test_badFields(self):
        """Every field is checked, and named when it is wrong."""
        wrong = {
            "vm": ["", "x" * 256, 1, None],
            "role": ["both", None, ["primary"], 1],
            "instance": ["", "x", HELLO.instance.upper(), "{" + HELLO.instance + "}", 3, None],
            "epoch": [-1, 1.5, True, "1", None, MAX_EPOCH + 1],
            "secondary": ["lazy", None, {}],
            "frames": [0, None, "yes"],
            "session": ["", None, HELLO.session + " "],
        }
        for name, values in wrong.items():
            for value in values:
                error = self.assertRaises(HelloRefused, Hello.fromMessage, {**HELLO.toMessage(), name: value})
                self.assertIn(f"'{name}'", error.reason)
            message = HELLO.toMessage()
            del message[name]
            self.assertRaises(HelloRefused, Hello.fromMessage, message)

    @settings(max_examples=100, deadline=None)
    @given(st.dictionaries(st.sampled_from(sorted(HELLO.toMessage())), _json))
    def test_anyMessage(self, fields):
        """A hello that is accepted can be said again; any other is refused in words."""
        try:
            hello = Hello.fromMessage({**HELLO.toMessage(), **fields})
        except HelloRefused as e:
            self.assertTrue(e.reason)
        else:
            self.assertEqual(Hello.fromMessage(json.loads(json.dumps(hello.toMessage()))), hello)

    def test_fault(self):
        peer = replace(HELLO, role="secondary", instance=str(uuid4()), epoch=2)
        self.assertIsNone(HELLO.fault(peer))
        for change, words in (
            ({"vm": "mail"}, "'mail'"),
            ({"role": "primary"}, "both daemons are primary"),
            ({"instance": HELLO.instance}, "this very daemon"),
            ({"secondary": "passive"}, "secondary=passive"),
        ):
            self.assertIn(words, HELLO.fault(replace(peer, **change)))

    def test_refusalIsAPeerError(self):
        self.assertTrue(issubclass(HelloRefused, PeerError))
