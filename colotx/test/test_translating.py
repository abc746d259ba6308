"""
L{colotx.guests.translating}: translator and replay at a port.
"""

from twisted.internet.defer import succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from colotx._portbase import BasePort
from colotx.errors import GuestLost
from colotx.guests.translating import TranslatingPort
from colotx.interfaces import IFramePort
from colotx.test.test_translate import Pair, frame, read, stamps
from colotx.translate import JUMP


@implementer(IFramePort)
class FakePort(BasePort):
    """A guest's NIC that notes what is done to it."""

    congested = False

    def __init__(self):
        self.sent = []
        self.calls = []

    def send(self, frames):
        self.sent += frames

    def pause(self):
        self.calls.append("pause")

    def resume(self):
        self.calls.append("resume")

    def drain(self):
        self.calls.append("drain")

    def open(self):
        return succeed("opened")

    def close(self):
        return succeed("closed")


class TranslatingPortTests(SynchronousTestCase):
    def setUp(self):
        self.inner = FakePort()
        self.port = TranslatingPort(self.inner, Clock().seconds)
        self.heard = []
        self.port.receiver = self.heard.extend
        self.pair = Pair(self.port.translator)

    def say(self, **fields):
        self.inner.receiver([frame("v4", True, **fields)])

    def tell(self, **fields):
        self.port.send([frame("v4", False, **fields)])

    def accept(self):
        pair = self.pair
        self.say(flags="SA", seq=pair.secondary, ack=pair.client + 1, ts=(pair.secondaryTime, 5))
        self.tell(seq=pair.client + 1, ack=pair.primary + 1, ts=(6, pair.primaryTime))
        self.heard.clear()
        self.inner.sent.clear()

    def test_interface(self):
        verifyObject(IFramePort, self.port)
        for call in ("pause", "resume", "drain"):
            getattr(self.port, call)()
        self.assertEqual(self.inner.calls, ["pause", "resume", "drain"])
        self.assertEqual(self.successResultOf(self.port.open()), "opened")
        self.assertEqual(self.successResultOf(self.port.close()), "closed")
        self.inner.congested = True
        self.assertTrue(self.port.congested)
        lost = []
        self.port.onLost = lost.append
        self.inner._fail(GuestLost("it died"))
        self.assertEqual(len(lost), 1)
        self.flushLoggedErrors()

    def test_bothDirections(self):
        self.accept()
        self.say(seq=self.pair.secondary + 1)
        self.assertEqual(read(self.heard[0]).seq, self.pair.primary + 1)
        self.tell(ack=self.pair.primary + 1)
        self.assertEqual(read(self.inner.sent[0]).ack, self.pair.secondary + 1)

    def test_checkpointLoaded(self):
        self.accept()
        self.say(seq=self.pair.secondary + 1, data=b"x")
        self.port.checkpointLoaded()
        self.port.promoted()
        self.heard.clear()
        self.port.replay()
        self.assertEqual(self.heard, [])
        self.say(seq=9)
        self.assertEqual(read(self.heard[0]).seq, 9)

    def test_failover(self):
        """Sent again once, in the client's space; what the guest says then has a TSval that is not below."""
        self.accept()
        pair = self.pair
        self.say(seq=pair.secondary + 1, ts=(pair.secondaryTime + 3, 6), data=b"lost")
        self.say(port=9, seq=50, ts=(70, 6), data=b"old")
        self.heard.clear()
        self.port.promoted()
        self.port.promoted()
        self.port.replay()
        self.port.replay()
        self.assertEqual(
            [(read(raw).seq, stamps(raw)[0]) for raw in self.heard],
            [(pair.primary + 1, pair.primaryTime + 3 + JUMP), (50, 70 + JUMP)],
        )
        self.heard.clear()
        self.say(seq=pair.secondary + 5, ts=(pair.secondaryTime + 3, 6))
        self.say(port=9, seq=53, ts=(70, 6))
        self.tell(seq=6, ack=pair.primary + 5, ts=(7, pair.primaryTime + 3 + JUMP))
        self.assertEqual(
            [(read(raw).seq, stamps(raw)[0]) for raw in self.heard],
            [(pair.primary + 5, pair.primaryTime + 3 + JUMP), (53, 70 + JUMP)],
        )
        self.assertEqual(stamps(self.inner.sent[0]), (7, pair.secondaryTime + 3))

    def test_nobodyReceives(self):
        self.port.receiver = None
        self.say(seq=1)
        self.assertEqual(self.port.dropped, 1)
