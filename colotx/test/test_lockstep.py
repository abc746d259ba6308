"""Both roles with an active secondary: who gets which frame, what leaves, and who goes on."""

from __future__ import annotations

from twisted.internet.defer import fail as failed

from colotx.errors import GuestError
from colotx.guests.translating import TranslatingPort
from colotx.interfaces import ColoMode
from colotx.test.rolekit import RoleCase
from colotx.test.test_translate import Pair
from colotx.translate import Translator

SAME = b"\x01" * 12 + b"\x88\xb5 both say"
OTHER = b"\x01" * 12 + b"\x88\xb5 one says"


class LockstepCase(RoleCase):
    kind = "active"
    policy = "failover"

    def secondarySays(self, *frames: bytes) -> None:
        self.b.role.standby.port.receiver(list(frames))


class CompareTests(LockstepCase):
    def test_whatBothSayLeavesAtOnce(self) -> None:
        self.protect()
        self.a.say(SAME)
        self.advance(0.002)
        self.assertEqual(self.a.heard, [])
        self.secondarySays(SAME)
        self.advance(0.002)
        self.assertEqual(self.a.heard, [SAME])
        self.assertEqual(self.b.heard, [])

    def test_differenceAsksForACheckpoint(self) -> None:
        self.a.role.trigger._delay = 60000
        self.protect()
        self.a.say(OTHER)
        self.assertEqual(self.a.heard, [])
        self.secondarySays(SAME)
        self.advance(0.04)
        self.assertEqual(self.a.heard, [OTHER])
        self.assertEqual(self.a.around.statistics.describe()["checkpoints"], 2)  # and the initial one

    def test_oldOutputOfTheSecondaryMatchesNothingNew(self) -> None:
        self.protect()
        self.secondarySays(SAME)
        self.advance(0.11)
        self.a.say(SAME)
        self.advance(0.01)
        self.assertEqual(self.a.heard, [])

    def test_timeOutAsksForACheckpoint(self) -> None:
        self.a.role.trigger._delay = 60000
        self.protect()
        self.a.say(OTHER)
        self.advance(3.0)
        self.assertEqual(self.a.heard, [])
        self.advance(1.2)
        self.assertEqual(self.a.heard, [OTHER])
        self.assertEqual(self.a.role.evidence.describe()["reasons"], {"time-out": 1})

    def test_lostSecondary(self) -> None:
        """What was not agreed on leaves when this side goes on alone."""
        session = self.protect()
        self.a.say(OTHER)
        self.advance(0.002)
        session.cut()
        self.advance(0.01)
        self.assertEqual(self.a.heard, [OTHER])
        self.assertSpeaks(self.a, self.b)  # the policy of both, see the architecture

    def test_statistics(self) -> None:
        self.protect()
        self.a.say(SAME)
        self.secondarySays(SAME)
        self.advance(0.005)
        described = self.a.role.describe()
        self.assertEqual(described["compare"]["statistics"]["released"], 2)  # and the guest's ARP
        self.assertEqual((described["held-frames"], described["held-bytes"]), (0, 0))
        self.a.say(OTHER)
        described = self.a.role.describe()
        self.assertEqual((described["held-frames"], described["held-bytes"]), (1, len(OTHER)))
        self.advance(0.15)
        described = self.a.role.describe()
        self.assertEqual((described["held-frames"], described["held-bytes"]), (0, 0))


class FailoverTests(LockstepCase):
    def test_secondaryGoesOn(self) -> None:
        session = self.protect()
        self.a.role.guest.shutdown()
        session.cut()
        self.advance(0.05)
        self.assertSpeaks(self.b)

    def test_atEveryInstantOfACheckpoint(self) -> None:
        for step in range(40):
            with self.subTest(step=step):
                self.setUp()
                session = self.protect()
                self.a.role.trigger.notify("now")
                for _ in range(step):
                    self.clock.advance(0.0002)
                    if session.left.transport.sent or session.right.transport.sent:
                        pair = (session.left, session.right)
                        source, target = pair if pair[0].transport.sent else pair[::-1]
                        target.colo.dataReceived(source.transport.sent.popleft())
                self.a.role.guest.shutdown()
                session.cut()
                self.advance(0.05)
                self.assertSpeaks(self.b)
                self._end()

    def test_failedLoadIsNeverPromoted(self) -> None:
        self.protect()
        standby = self.b.role.standby
        standby.settle = lambda: failed(GuestError("bad state"))
        standby.__class__ = type("Broken", (type(standby),), {"promotable": False})
        self.advance(0.15)
        self.assertIs(self.b.role.mode, ColoMode.NONE)
        self.assertSpeaks(self.a)
        self.assertIn("unprotected", self.a.why)

    def test_lostStandbyLetsThePrimaryGoOn(self) -> None:
        self.protect()
        standby = self.b.role.standby
        standby.__class__ = type("Dead", (type(standby),), {"promotable": False})
        standby.onLost(GuestError("the VM that stood by died"))
        self.advance(0.01)
        self.assertSpeaks(self.a)
        self.assertIn("unprotected", self.a.why)
        self.assertIn("unprotected", self.b.why)


class TranslationTests(LockstepCase):
    """After a failover the new primary's port translates; so must its next secondary's."""

    def test_handedOn(self) -> None:
        entries = exported(450)
        self.a.role.guest.port = port = TranslatingPort(self.a.role.guest.port, self.clock.seconds)
        port.translator.adopt(entries)
        session = self.protect()
        self.assertEqual(session.left.said.count("translations"), 3)
        self.assertEqual(
            sorted(map(str, self.b.role.standby.port.translator.export())), sorted(map(str, entries))
        )

    def test_nonsense(self) -> None:
        session = self.protect()
        session.right.onMessage({"type": "translations", "entries": [{"flow": "zz"}], "more": False})
        self.advance(0.01)
        self.assertIsNotNone(session.right.error)


def exported(count: int):
    """What a translator says that knows so many connections."""
    translator = Translator(lambda: 0.0)
    for port in range(1000, 1000 + count):
        Pair(translator, port=port).accept()
    return translator.export()
