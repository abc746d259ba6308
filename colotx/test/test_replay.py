"""
L{colotx.replay}: what was said and not acknowledged.
"""

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from twisted.trial.unittest import SynchronousTestCase

from colotx.replay import ReplayBuffer, ReplayLimits
from colotx.test.test_translate import M, frame, read, stamps
from colotx.translate import JUMP

START = M - 250
"""Sequence numbers wrap in these tests."""


def said(number, shape="v4", port=4711, size=100, **fields):
    """The guest's segment C{number}."""
    return frame(
        shape, True, port, seq=START + number * 100, ts=(1000 + number, 5), data=b"d" * size, **fields
    )


def heard(number, shape="v4", port=4711, **fields):
    """The client has all before segment C{number}."""
    return frame(shape, False, port, ack=START + number * 100, **fields)


class ReplayTests(SynchronousTestCase):
    def setUp(self):
        self.buffer = ReplayBuffer(ReplayLimits(connections=3, perConnection=20_000, total=30_000))

    def numbers(self):
        """Which segments would be sent again; an A for a bare acknowledgement."""
        result = []
        for raw in self.buffer.replay():
            tcp = read(raw)
            payload = bytes(tcp.payload)
            result.append(((tcp.seq - START) % M) // 100 if payload else "A")
        return result

    def test_outstanding(self):
        self.buffer.output([said(n) for n in range(6)])
        self.assertEqual(self.numbers(), [0, 1, 2, 3, 4, 5])
        self.buffer.input([heard(4)])
        self.assertEqual(self.numbers(), [4, 5])
        self.buffer.input([heard(2)])
        self.assertEqual(self.numbers(), [4, 5], "an old acknowledgement")
        self.buffer.output([said(4)])
        self.assertEqual(self.numbers(), [4, 5, "A"], "a retransmission is remembered already")
        self.buffer.input([heard(6)])
        self.assertEqual(self.buffer.size, 0)

    def test_burst(self):
        self.buffer.output([said(n) for n in range(30)])
        self.assertEqual(self.numbers(), [*range(10), 29])

    def test_acknowledgementAlone(self):
        for shape in ("v4", "v4 options", "v4 q-in-q", "v4 odd", "v6", "v6 vlan"):
            with self.subTest(shape):
                self.setUp()
                self.buffer.output([said(0, shape, ack=77, flags="PA")])
                self.buffer.input([heard(1, shape)])
                (raw,) = self.buffer.replay()
                tcp = read(raw)
                self.assertEqual((tcp.seq, tcp.ack, tcp.flags), ((START + 100) % M, 77, "A"))
                self.assertEqual(stamps(raw), (1000 + JUMP, 5))
                self.assertEqual(bytes(tcp.payload), b"")
                packet = Ether(raw)
                if IP in packet:
                    again = packet.copy()
                    del again[IP].chksum, again[IP].len
                    self.assertEqual(bytes(again), raw)
                else:
                    self.assertEqual(packet[IPv6].plen, len(bytes(packet[TCP])))

    def test_noAcknowledgementBehindExtensionHeaders(self):
        self.buffer.output([said(0, "v6 extension")])
        self.buffer.input([heard(1, "v6 extension")])
        self.assertEqual(self.buffer.replay(), [])

    def test_newerAcknowledgement(self):
        self.buffer.output([said(0, ack=5), frame("v4", True, seq=START + 100, ack=99, ts=(1007, 6))])
        first, last = map(read, self.buffer.replay())
        self.assertEqual((first.ack, last.ack), (5, 99))

    def test_timestampsGoAhead(self):
        """The client may have taken a later TSval of the primary than what is sent again would have."""
        self.buffer.output([said(n) for n in range(3)])
        self.assertEqual({stamps(raw) for raw in self.buffer.replay()}, {(1002 + JUMP, 5)})
        self.assertEqual(self.buffer.withTimestamps(), [said(0)[26:38]])
        self.buffer.output([frame("v4", True, 9, data=b"x")])
        self.assertEqual(len(self.buffer.withTimestamps()), 1)

    def test_handshake(self):
        synAck = frame("v4", True, flags="SA", seq=START, ack=5, ts=(7, 1))
        self.buffer.output([synAck])
        self.assertEqual(self.buffer.replay(), [synAck])
        self.buffer.input([frame("v4", False, flags="A", ack=123)])
        self.assertEqual(self.numbers(), ["A"])

    def test_fin(self):
        self.buffer.output([frame("v4", True, flags="FA", seq=START)])
        (raw,) = self.buffer.replay()
        self.assertEqual(read(raw).flags, "FA")
        self.buffer.input([frame("v4", False, ack=START + 1)])
        self.assertEqual([read(raw).seq for raw in self.buffer.replay()], [START + 1])

    def test_resets(self):
        for fromGuest in (True, False):
            self.buffer.output([said(0)])
            reset = frame("v4", fromGuest, flags="R", seq=START)
            self.buffer.output([reset]) if fromGuest else self.buffer.input([reset])
            self.assertEqual((len(self.buffer), self.buffer.size, self.buffer.replay()), (0, 0, []))

    def test_portReuse(self):
        self.buffer.output([said(n) for n in range(3)])
        self.buffer.output([frame("v4", True, flags="SA", seq=5), frame("v4", True, seq=6, data=b"new")])
        self.buffer.input([frame("v4", False, ack=6)])
        (raw,) = self.buffer.replay()
        self.assertEqual(bytes(read(raw).payload), b"new")

    def test_onlyTcp(self):
        datagram = Ether(dst="02:00:00:00:00:01") / IP(src="10.0.0.2", dst="10.0.0.9") / UDP() / Raw(b"x")
        self.buffer.output([bytes(datagram), b"", b"short"])
        self.buffer.input([bytes(datagram)])
        self.assertEqual(len(self.buffer), 0)

    def test_reset(self):
        self.buffer.output([said(0)])
        self.buffer.reset()
        self.assertEqual((len(self.buffer), self.buffer.size, self.buffer.replay()), (0, 0, []))

    def test_bounds(self):
        self.buffer.output([said(n, size=9000) for n in range(3)])
        self.assertLess(self.buffer.size, 20_000)
        self.buffer.output([said(n, port=2, size=9000) for n in range(3)])
        self.assertLess(self.buffer.size, 30_000)
        self.assertEqual(self.buffer.skipped, 3)
        for port in range(10, 20):
            self.buffer.output([said(0, port=port)])
        self.assertEqual(len(self.buffer), 3)
        self.assertEqual(self.buffer.size, 3 * len(said(0)))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=30))
    def test_exactlyTheOutstanding(self, steps):
        """In any order of sending, sending again and acknowledging: what is beyond the highest acknowledgement."""
        self.setUp()
        sent = acknowledged = 0
        for speaks, number in steps:
            if speaks:
                number = min(number, sent)
                sent = max(sent, number + 1)
                self.buffer.output([said(number)])
            else:
                number = min(number, sent)
                acknowledged = max(acknowledged, number)
                self.buffer.input([heard(number)])
        self.assertEqual([n for n in self.numbers() if n != "A"], list(range(acknowledged, sent)))
