"""What an operator may set: every default, every refusal, by key and with the right words."""

from __future__ import annotations

from dataclasses import fields, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.settings import (
    DEFAULT_PORT,
    HostPort,
    Settings,
    buildSettings,
    defaultStateDir,
    keyOf,
    parseSize,
    stateRoot,
)

CERTIFICATES = {"ca": "ca.crt", "certificate": "host.crt", "key": "host.key"}
WORDS = st.text(st.characters(codec="utf-8"), max_size=30)


def build(**values):
    """Settings of a primary; C{_} in a name stands for the dash of the key."""
    return buildSettings({"role": "primary"} | {key.replace("_", "-"): v for key, v in values.items()})


class HostPortTests(SynchronousTestCase):
    def test_forms(self) -> None:
        for text, expected in (
            ("host.example", HostPort("host.example", DEFAULT_PORT)),
            (" 192.0.2.1:80 ", HostPort("192.0.2.1", 80)),
            ("[2001:db8::1]:65535", HostPort("2001:db8::1", 65535)),
            ("[::1]", HostPort("::1", DEFAULT_PORT)),
        ):
            self.assertEqual(HostPort.parse(text), expected)

    def test_refused(self) -> None:
        for text in ("", "::1", "host:", "host:x", "[::1", "a:1:2", "host:123456"):
            self.assertIn("[IPv6]:PORT", str(self.assertRaises(ConfigError, HostPort.parse, text)))
        for text in ("host:0", "host:65536"):
            self.assertIn("1 to 65535", str(self.assertRaises(ConfigError, HostPort.parse, text)))

    def test_loopback(self) -> None:
        for host, loopback in (
            ("localhost", True),
            ("127.8.0.1", True),
            ("::1", True),
            ("192.0.2.1", False),
            ("::", False),
            ("localhost.example", False),
        ):
            self.assertIs(HostPort(host, 1).isLoopback, loopback, host)

    @given(st.one_of(st.ip_addresses().map(str), st.just("a.example")), st.integers(1, 65535))
    @settings(max_examples=50, deadline=None)
    def test_textIsParsedBack(self, host, port) -> None:
        address = HostPort(host, port)
        self.assertEqual(HostPort.parse(str(address)), address)

    @given(WORDS)
    @settings(max_examples=100, deadline=None)
    def test_anyTextIsAnAddressOrRefused(self, text) -> None:
        try:
            address = HostPort.parse(text)
        except ConfigError:
            return
        self.assertTrue(address.host)
        self.assertTrue(0 < address.port < 65536)


class SizeTests(SynchronousTestCase):
    def test_units(self) -> None:
        for text, size in (("0", 0), (4096, 4096), ("3K", 3 << 10), (" 2M ", 2 << 20), ("1G", 1 << 30)):
            self.assertEqual(parseSize(text), size)

    def test_refused(self) -> None:
        for text in ("", "1k", "1.5M", "-1", "1T", "M", True):
            self.assertIn("K, M or G", str(self.assertRaises(ConfigError, parseSize, text)))


class BuildTests(SynchronousTestCase):
    def refused(self, *words: str, **values) -> None:
        """These values are refused in one line with all the words in it."""
        message = str(self.assertRaises(ConfigError, build, **values))
        self.assertNotIn("\n", message)
        for word in words:
            self.assertIn(word, message)

    def test_defaults(self) -> None:
        self.assertEqual(build(), Settings(role="primary"))

    def test_keys(self) -> None:
        self.assertEqual(keyOf("checkpointDelay"), "checkpoint-delay")
        self.assertEqual(keyOf("onLostPeer"), "on-lost-peer")
        self.assertEqual(keyOf("vm"), "vm")
        keys = [keyOf(field.name) for field in fields(Settings)]
        self.assertEqual(len(set(keys)), len(keys))

    def test_unknownKeyListsTheKnown(self) -> None:
        self.refused("'chekpoint-delay'", "checkpoint-delay", chekpoint_delay=1)

    def test_values(self) -> None:
        built = build(
            peer="[::1]:9",
            memory_size="32M",
            checkpoint_delay="50",
            trace="yes",
            qemu_arguments="-m 262152K -drive 'file=a b'",
        )
        self.assertEqual(built.peer, HostPort("::1", 9))
        self.assertEqual(built.memorySize, 32 << 20)
        self.assertEqual(built.checkpointDelay, 50)
        self.assertIs(built.trace, True)
        self.assertEqual(built.qemuArguments, ("-m", "262152K", "-drive", "file=a b"))

    def test_valuesOfAFile(self) -> None:
        """TOML has types of its own."""
        built = build(checkpoint_delay=50, trace=False, qemu_arguments=["-m", "1G"], memory_size=1 << 20)
        self.assertEqual((built.checkpointDelay, built.trace, built.qemuArguments), (50, False, ("-m", "1G")))

    def test_wrongTypes(self) -> None:
        self.refused("checkpoint-delay", "whole number", checkpoint_delay="soon")
        self.refused("checkpoint-delay", "whole number", checkpoint_delay=[1])
        self.refused("trace", "yes nor no", trace="maybe")
        self.refused("vm", "string", vm=7)
        self.refused("qemu-arguments", "list of strings", qemu_arguments=["-m", 1])
        self.refused("qemu-arguments", "list of strings", qemu_arguments=7)
        self.refused("peer", "[IPv6]:PORT", peer="a:b:c")
        self.refused("memory-size", "K, M or G", memory_size="much")

    def test_fractionsAreNoMilliseconds(self) -> None:
        """Neither cut off without a word, nor a yes that counts as 1."""
        self.refused("checkpoint-delay", "whole number", checkpoint_delay=0.5)
        self.refused("checkpoint-delay", "whole number", checkpoint_delay=99.9)
        self.refused("checkpoint-delay", "whole number", checkpoint_delay=True)

    def test_unbalancedQuote(self) -> None:
        self.refused("qemu-arguments", qemu_arguments="-name 'a")

    def test_outside(self) -> None:
        """Refused with the other options, not when the guest's first frame leaves."""
        self.refused("outside", "tap:NAME", outside="tun0")

    def test_choices(self) -> None:
        self.assertIn("primary, secondary", str(self.assertRaises(ConfigError, buildSettings, {})))
        self.refused("guest", "memory, qemu", guest="xen")
        self.refused("secondary", "passive", secondary="actve")
        self.refused("on-lost-peer", "hold, failover", on_lost_peer="panic")
        self.refused("scheduling", "realtime, normal", scheduling="idle")

    def test_ranges(self) -> None:
        self.refused("vm", "at most 64", vm="../x")
        self.refused("mac", "no MAC", mac="52:54:00")
        self.refused("mac", "multicast", mac="01:00:5e:00:00:01")
        for delay in (0, 1 << 32):
            self.refused("checkpoint-delay", "4294967295", checkpoint_delay=delay)
        self.refused("heartbeat-interval", "10 to 60000", heartbeat_interval=9)
        self.refused("heartbeat-limit", "twice", heartbeat_interval=100, heartbeat_limit=199)
        self.refused("memory-size", "1M", memory_size="1000K")
        self.refused("memory-size", "4096", memory_size=(1 << 20) + 1)
        self.refused("memory-dirty", "negative", memory_dirty=-1)

    def test_memoryAddress(self) -> None:
        self.refused("memory-address", memory_address="10.0.0.300/24")
        self.refused("memory-address", memory_address="10.0.0.1/40")


class CertificateTests(SynchronousTestCase):
    """A link that leaves the machine is authenticated, or is not."""

    def test_allOrNone(self) -> None:
        for missing in CERTIFICATES:
            given = {key: value for key, value in CERTIFICATES.items() if key != missing}
            self.assertIn("together", str(self.assertRaises(ConfigError, build, **given)))

    def test_neededBeyondLoopback(self) -> None:
        error = self.assertRaises(ConfigError, build, peer="192.0.2.1")
        self.assertIn("colo certs init", str(error))
        error = self.assertRaises(ConfigError, buildSettings, {"role": "secondary", "listen": "0.0.0.0"})
        self.assertIn("0.0.0.0:7800", str(error))
        self.assertEqual(build(peer="192.0.2.1", **CERTIFICATES).peerAddress.host, "192.0.2.1")

    def test_secondaryMustKnowWhomToExpect(self) -> None:
        values = {"role": "secondary", "listen": "0.0.0.0"} | CERTIFICATES
        self.assertIn("peer-name", str(self.assertRaises(ConfigError, buildSettings, values)))
        for key in ("peer", "peer-name"):
            buildSettings(values | {key: "primary.example"})


class PlaceTests(SynchronousTestCase):
    def test_link(self) -> None:
        there, here = HostPort("192.0.2.1", 1), HostPort("192.0.2.2", 2)
        primary = Settings(role="primary", peer=there, listen=here)
        self.assertEqual(primary.link, there)
        self.assertEqual(replace(primary, role="secondary").link, here)
        self.assertEqual(Settings(role="primary").link, HostPort("127.0.0.1", DEFAULT_PORT))

    def test_stateDirOfARealPairIsOneForBothRoles(self) -> None:
        """Else the epoch would be forgotten when the role changes."""
        remote = HostPort("192.0.2.1", 1)
        primary = Settings(role="primary", peer=remote, listen=remote)
        self.assertEqual(defaultStateDir(primary), defaultStateDir(replace(primary, role="secondary")))
        self.assertEqual(defaultStateDir(primary), f"{stateRoot()}/guest0")

    def test_stateDirsOfAPairOnOneMachineDiffer(self) -> None:
        primary = Settings(role="primary")
        self.assertNotEqual(defaultStateDir(primary), defaultStateDir(replace(primary, role="secondary")))

    def test_stateRootOfAUser(self) -> None:
        self.patch(__import__("os"), "geteuid", lambda: 1000)
        self.patch(__import__("os"), "environ", {"XDG_STATE_HOME": "/home/u/state"})
        self.assertEqual(stateRoot(), "/home/u/state/colotx")
