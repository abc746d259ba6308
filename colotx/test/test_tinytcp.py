"""Tests of the embedded guest's machine and network: packets in, packets out. Scapy is the independent eye."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError, GuestError
from colotx.guests._machine import Machine, MemorySettings
from colotx.guests._nic import checksum
from colotx.guests._tinytcp import RING, TcpEcho

MAC, ADDRESS = "52:54:00:c0:10:02", "10.77.0.2"
PEER_MAC, PEER = "02:00:00:00:00:01", "10.77.0.1"
SMALL = MemorySettings(ramBytes=2 << 20, dirtyPages=0, mac=MAC, address=ADDRESS)
MSS = 1460


class MachineTests(SynchronousTestCase):
    """Ticks, the memory check, and going on from a checkpoint."""

    def test_settings(self):
        """What cannot be is refused with what can."""
        for wrong, word in [
            ({"ramBytes": 4096}, "multiple of 4096"),
            ({"ramBytes": (2 << 20) + 1}, "multiple of 4096"),
            ({"dirtyPages": 100_000}, "dirty pages"),
            ({"tickMs": 0}, "1 to 10000"),
            ({"mac": "52:54:00:12:34"}, "unicast MAC"),
            ({"mac": "01:54:00:12:34:56"}, "unicast MAC"),
            ({"mac": "52:54:00:12:34:xx"}, "unicast MAC"),
            ({"address": "10.0.0"}, "IPv4 address"),
        ]:
            self.assertIn(word, str(self.assertRaises(ConfigError, MemorySettings, **wrong)))

    def machine(self, **changes):
        return Machine.powerOn(MemorySettings(ramBytes=2 << 20, **changes), lambda frame: None)

    def restored(self, machine):
        content = machine.memory.pages.reshape(-1).copy()
        return Machine.restore(content, machine.deviceState(), lambda frame: None)

    def test_goesOnExactly(self):
        """A machine and one made from its state have the same future, round after round of the check."""
        one = self.machine(dirtyPages=33)
        for _ in range(3):
            two = self.restored(one)
            for _ in range(10):
                one.tick()
                two.tick()
            self.assertTrue((one.memory.pages == two.memory.pages).all())
            self.assertEqual(one.deviceState(), two.deviceState())
        self.assertEqual((one.ticks, one.writes), (30, 990))

    def test_dirtyPages(self):
        """Exactly the pages that changed are dirty."""
        one = self.machine(dirtyPages=5)
        one.memory.takeDirty()
        for _ in range(60):
            before = one.memory.pages.copy()
            one.tick()
            changed = (one.memory.pages != before).any(axis=1).nonzero()[0]
            self.assertEqual(one.memory.takeDirty().tolist(), changed.tolist())

    def test_corruptionIsFound(self):
        """One flipped bit in any page of the area is found within a round."""
        for page in [300, 400, 511]:
            one = self.machine(dirtyPages=100)
            for _ in range(5):
                one.tick()
            one.memory.pages[page, 77] ^= 1
            error = self.assertRaises(GuestError, lambda one=one: [one.tick() for _ in range(3)])
            self.assertIn(f"page {page} ", str(error))

    def test_tornCheckpoint(self):
        """RAM of one tick and device state of another are refused."""
        one = self.machine()
        state = one.deviceState()
        one.tick()
        content = one.memory.pages.reshape(-1).copy()
        error = self.assertRaises(GuestError, Machine.restore, content, state, None)
        self.assertIn("torn", str(error))

    def test_foreignDeviceState(self):
        """Device state with any byte of its frame changed, or another length, is refused."""
        one = self.machine()
        content, state = one.memory.pages.reshape(-1), one.deviceState()
        for wrong in [
            b"",
            state[:-1],
            state + b"\0",
            b"\3" + state[1:],
            state.replace(b"memory/nic", b"memory/nix"),
        ]:
            self.assertRaises(GuestError, Machine.restore, content, wrong, None)


class NicTests(SynchronousTestCase):
    """ARP, ping and UDP."""

    def setUp(self):
        self.out = []
        self.machine = Machine.powerOn(SMALL, self.out.append)

    def exchange(self, packet):
        """@return: the answers to a packet."""
        self.out.clear()
        self.machine.receive([bytes(packet)])
        return [Ether(frame) for frame in self.out]

    def toGuest(self, *layers):
        packet = Ether(src=PEER_MAC, dst=MAC) / IP(src=PEER, dst=ADDRESS)
        for layer in layers:
            packet = packet / layer
        return packet

    def test_powerOn(self):
        """At its first tick it makes itself known."""
        self.machine.tick()
        (frame,) = map(Ether, self.out)
        self.assertEqual(
            (frame.dst, frame[ARP].psrc, frame[ARP].pdst), ("ff:ff:ff:ff:ff:ff", ADDRESS, ADDRESS)
        )
        self.out.clear()
        self.machine.tick()
        self.assertEqual(self.out, [])

    def test_arp(self):
        """It answers for its own address only."""
        ask = Ether(src=PEER_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=PEER_MAC, psrc=PEER, pdst=ADDRESS)
        (answer,) = self.exchange(ask)
        self.assertEqual((answer.dst, answer[ARP].op, answer[ARP].hwsrc), (PEER_MAC, 2, MAC))
        self.assertEqual((answer[ARP].psrc, answer[ARP].pdst, answer[ARP].hwdst), (ADDRESS, PEER, PEER_MAC))
        ask[ARP].pdst = "10.77.0.3"
        self.assertEqual(self.exchange(ask), [])

    def rebuilt(self, packet):
        """The packet with scapy's own checksums."""
        copy = packet.copy()
        for layer in (IP, ICMP, UDP, TCP):
            if layer in copy:
                del copy[layer].chksum
        return bytes(copy)

    def test_ping(self):
        """Echo, with right checksums."""
        for size in [0, 1, 56, 1472]:
            (answer,) = self.exchange(self.toGuest(ICMP(id=7, seq=3), Raw(b"x" * size)))
            self.assertEqual((answer[ICMP].type, answer[ICMP].id, answer[ICMP].seq), (0, 7, 3))
            self.assertEqual(bytes(answer[ICMP].payload)[:size], b"x" * size)
            self.assertEqual(self.rebuilt(answer), bytes(answer))

    def test_udpEcho(self):
        """Echo on port 7, with right checksums; nothing on others."""
        for size in [0, 1, 500, 1472]:
            (answer,) = self.exchange(self.toGuest(UDP(sport=999, dport=7), Raw(bytes(size))))
            self.assertEqual(answer[UDP].len, 8 + size)
            self.assertEqual((answer[UDP].sport, answer[UDP].dport), (7, 999))
            self.assertEqual(self.rebuilt(answer), bytes(answer))
        self.assertEqual(self.exchange(self.toGuest(UDP(sport=999, dport=8), Raw(b"x"))), [])
        self.assertEqual(self.exchange(self.toGuest(UDP(sport=7, dport=7), Raw(b"x"))), [])

    def test_udpRandom(self):
        """16 bytes on port 17, other ones each time; echo and random never answer each other."""
        answers = [self.exchange(self.toGuest(UDP(sport=999, dport=17), b"x"))[0] for _ in range(2)]
        for answer in answers:
            self.assertEqual((answer[UDP].sport, answer[UDP].len), (17, 24))
            self.assertEqual(self.rebuilt(answer), bytes(answer))
        first, second = (bytes(answer[UDP].payload) for answer in answers)
        self.assertNotEqual(first, second)
        self.assertEqual(self.exchange(self.toGuest(UDP(sport=7, dport=17), b"x")), [])

    def test_ignored(self):
        """What is broken, fragmented or not for it stays without answer."""
        good = bytes(self.toGuest(UDP(sport=999, dport=7), Raw(b"hello")))
        self.assertEqual(len(self.exchange(good)), 1)
        for place in [14 + 10, 14 + 26, 14 + 30]:
            bad = bytearray(good)
            bad[place] ^= 1
            self.assertEqual(self.exchange(bad), [], place)
        for length in range(len(good)):
            self.assertEqual(self.exchange(good[:length]), [], length)
        for layers in [IP(dst="10.77.0.3"), IP(dst=ADDRESS, src="224.0.0.1"), IP(dst=ADDRESS, flags="MF")]:
            packet = Ether(src=PEER_MAC, dst=MAC) / layers / UDP(sport=9, dport=7) / b"hello"
            self.assertEqual(self.exchange(packet), [])
        self.assertEqual(self.exchange(b"\1" * 6 + good[6:]), [])

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=200))
    def test_checksum(self, data):
        """The shortcut gives the sum of RFC 1071."""
        total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) & 1)))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        if any(data):
            self.assertEqual(checksum(data), ~total & 0xFFFF)

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=80))
    def test_anything(self, tail):
        """No frame makes it fail."""
        good = bytes(self.toGuest(TCP(dport=7, flags="S")))
        for head in [b"", good[:12], good[:14], good[:34]]:
            self.machine.receive([head + tail])


class TcpTests(SynchronousTestCase):
    """The echo server, against a peer that does exactly what the test says."""

    port = 40000
    isn = 1000

    def setUp(self):
        self.out = []
        self.machine = Machine.powerOn(SMALL, self.out.append)
        self.seq = self.isn

    def segment(self, flags, data=b"", seq=None, ack=None, window=65535, **fields):
        """@return: the answers to one segment, which by default is the next in order and acknowledges all."""
        options = [("MSS", fields.pop("mss", MSS))] if "S" in flags else []
        tcp = TCP(
            sport=fields.pop("sport", self.port),
            dport=fields.pop("dport", 7),
            flags=flags,
            seq=(self.seq if seq is None else seq) % 2**32,
            ack=(getattr(self, "ack", 0) if ack is None else ack) % 2**32,
            window=window,
            options=options,
        )
        packet = Ether(src=PEER_MAC, dst=MAC) / IP(src=PEER, dst=ADDRESS) / tcp / data
        return self.answers(lambda: self.machine.receive([bytes(packet)]))

    def ticks(self, ms):
        return self.answers(lambda: [self.machine.tick() for _ in range(ms // SMALL.tickMs)])

    def answers(self, action):
        self.out.clear()
        action()
        answers = []
        for frame in self.out:
            packet = Ether(frame)
            if TCP in packet:
                copy = packet.copy()
                del copy[IP].chksum, copy[TCP].chksum
                self.assertEqual(bytes(copy), frame)
                length = packet[IP].len - 20 - packet[TCP].dataofs * 4
                packet[TCP].data = bytes(packet[TCP].payload)[:length]
                answers.append(packet[TCP])
        return answers

    def connect(self, **fields):
        """Shake hands; afterwards C{seq} is our next number, C{ack} the guest's."""
        (synAck,) = self.segment("S", **fields)
        self.assertEqual((synAck.flags, synAck.ack), ("SA", (self.seq + 1) % 2**32))
        self.assertEqual(synAck.options, [("MSS", MSS)])
        self.seq = (self.seq + 1) % 2**32
        self.ack = (synAck.seq + 1) % 2**32
        fields.pop("mss", None)
        self.assertEqual(self.segment("A", **fields), [])

    def test_random(self):
        """On port 17 as many bytes come back, other ones; a connection to port 7 from the same port is another."""
        self.connect()
        self.assertEqual(self.say(b"hello"), b"hello")
        self.connect(dport=17)
        (answer,) = self.segment("PA", b"a long enough line", dport=17)
        self.assertEqual((answer.sport, len(answer.data)), (17, 18))
        self.assertNotEqual(answer.data, b"a long enough line")
        # Sent again it is the same: it lies in RAM.
        (again,) = self.ticks(210)[-1:]
        self.assertEqual(again.data, answer.data)

    def say(self, data, **fields):
        """Send data in order. @return: what was echoed in answer."""
        answers = self.segment("PA", data, **fields)
        self.seq = (self.seq + len(data)) % 2**32
        self.assertEqual(answers[-1].ack, self.seq)
        return b"".join(answer.data for answer in answers)

    def test_echo(self):
        """Data comes back, with its acknowledgment; once acknowledged, silence."""
        self.connect()
        self.assertEqual(self.say(b"hello"), b"hello")
        self.ack += 5
        self.assertEqual(self.segment("A"), [])
        self.assertEqual(self.ticks(3000), [])
        self.assertEqual(self.say(b"again"), b"again")

    def test_wrap(self):
        """Both sequence numbers pass 2**32."""
        self.seq = 2**32 - 700
        self.port = 0xF5B2
        self.connect()
        self.assertGreater(self.ack, 2**32 - 4000)
        for n in range(10):
            data = bytes([n]) * 1000
            self.assertEqual(self.say(data), data)
            self.ack = (self.ack + 1000) % 2**32
            self.assertEqual(self.segment("A"), [])
        self.assertLess(self.ack, 20000)

    def test_retransmission(self):
        """Unacknowledged data is sent again after 200, 400, 800 ms ..., at last the connection is reset."""
        self.connect()
        self.say(b"hello")
        times, resets = [], []
        for ms in range(0, 130_000, 10):
            for answer in self.ticks(10):
                (resets if answer.flags.R else times).append(ms + 10)
                if not answer.flags.R:
                    self.assertEqual((answer.data, answer.seq), (b"hello", self.ack))
        self.assertEqual(times[:7], [200, 600, 1400, 3000, 6200, 12600, 22600])
        self.assertEqual((len(times), len(resets)), (15, 1))
        self.assertGreater(resets[0], 100_000)
        (refused,) = self.segment("A")
        self.assertTrue(refused.flags.R)

    def test_goBack(self):
        """After a time-out it sends again from the first byte missing, one segment first, more as they arrive."""
        self.connect()
        data = bytes(range(200)) * 30
        for start in range(0, 6000, 1000):
            self.say(data[start : start + 1000])
        (first,) = self.ticks(200)
        self.assertEqual((first.seq, first.data), (self.ack, data[:MSS]))
        got, acked = bytearray(first.data), 0
        while len(got) < 6000:
            acked = len(got)
            for answer in self.segment("A", ack=self.ack + acked):
                self.assertEqual(answer.seq, self.ack + len(got))
                got += answer.data
        self.assertEqual(got, data)

    def test_ackWhileGoingBack(self):
        """A bare acknowledgment is never older than what the peer has already seen."""
        self.connect()
        for _ in range(4):
            self.say(b"x" * 1000)
        self.ticks(200)
        (answer,) = self.segment("PA", b"x", seq=self.seq - 1)
        self.assertEqual((answer.data, answer.seq), (b"", self.ack + 4000))

    def test_ackAfterGoBack(self):
        """An acknowledgment of more than was sent again counts: the peer had it all."""
        self.connect()
        for _ in range(4):
            self.say(b"x" * 1000)
        self.ticks(200)
        self.assertEqual(self.segment("A", ack=self.ack + 4000), [])
        self.assertEqual(self.ticks(10_000), [])

    def test_duplicateAndDisorder(self):
        """What comes twice or early is acknowledged and not echoed; what overlaps is echoed from where it is new."""
        self.connect()
        start = self.seq
        self.assertEqual(self.say(b"abcd"), b"abcd")
        for data, at in [(b"abcd", start), (b"cd", start + 2), (b"later", start + 9)]:
            (answer,) = self.segment("PA", data, seq=at)
            self.assertEqual((answer.data, answer.ack), (b"", self.seq))
        (answer,) = self.segment("PA", b"cdef", seq=start + 2)
        self.assertEqual((answer.data, answer.ack), (b"ef", start + 6))

    def test_keepAlive(self):
        """A segment just left of the window is answered; an empty one in it is not."""
        self.connect()
        (answer,) = self.segment("A", seq=self.seq - 1)
        self.assertEqual(answer.ack, self.seq)
        self.assertEqual(self.segment("A", seq=self.seq), [])

    def test_peersMss(self):
        """No segment is larger than the peer wants."""
        self.connect(mss=100)
        answers = self.segment("PA", b"x" * 950)
        self.assertEqual([len(answer.data) for answer in answers], [100] * 9 + [50])

    def test_ownWindow(self):
        """When the peer takes nothing back, the ring fills, the window closes, and opens again as it reads."""
        self.connect(window=0)
        sent = 0
        while sent < 2 * RING:
            (answer,) = self.segment("PA", b"x" * 1000, seq=self.seq + sent, window=0)
            accepted = answer.ack - self.seq
            if accepted == sent:
                break
            sent = accepted
            self.assertLessEqual(sent + answer.window, RING)
        self.assertEqual((sent, answer.window), (RING, 0))
        got = 0
        while got < RING:
            answers = self.segment("A", seq=self.seq + sent, ack=self.ack + got)
            self.assertTrue(answers)
            window = answers[-1].window
            got += sum(len(answer.data) for answer in answers)
        self.assertGreaterEqual(window, RING // 2)
        self.assertEqual(self.segment("A", seq=self.seq + sent, ack=self.ack + got), [])
        (answer,) = self.segment("PA", b"x", seq=self.seq + sent, ack=self.ack + got)
        self.assertEqual((answer.data, answer.window), (b"x", RING - 1))

    def test_peersWindow(self):
        """It sends no more than the peer's window, probes a closed one, and goes on from the right byte."""
        self.connect(window=3)
        (first,) = self.segment("PA", b"hello", window=3)
        self.seq += 5
        self.assertEqual(first.data, b"hel")
        self.assertEqual(self.segment("A", ack=self.ack + 3, window=0), [])
        (probe,) = self.ticks(200)
        self.assertEqual((probe.seq, probe.data), (self.ack + 3, b"l"))
        (refused,) = self.ticks(400)
        self.assertEqual(refused.data, b"l")
        (rest,) = self.segment("A", ack=self.ack + 3, window=1000)
        self.assertEqual((rest.seq, rest.data), (self.ack + 3, b"lo"))
        (again,) = self.ticks(200)
        self.assertEqual(again.data, b"lo")
        self.assertEqual(self.segment("A", ack=self.ack + 5), [])
        self.assertEqual(self.ticks(1000), [])

    def test_longZeroWindow(self):
        """A window that stays closed for minutes is no reason to give up while the peer answers."""
        self.connect(window=0)
        self.segment("PA", b"hello", window=0)
        self.seq += 5
        for _ in range(150):
            for probe in self.ticks(1000):
                self.assertFalse(probe.flags.R)
                self.assertEqual(self.segment("A", window=0), [])
        self.assertEqual(self.segment("A")[0].data, b"hello")

    def test_close(self):
        """The peer closes: the echo of all it sent, then our FIN, sent again if lost, then nothing is left."""
        self.connect(window=3)
        self.segment("PA", b"hello", window=3)
        self.assertEqual(self.segment("FA", seq=self.seq + 5, window=3)[0].ack, self.seq + 6)
        (rest,) = self.segment("FA", seq=self.seq + 5, ack=self.ack + 3)[:1]
        self.assertEqual(rest.data, b"lo")
        (fin,) = self.segment("A", seq=self.seq + 6, ack=self.ack + 5)[-1:] or self.ticks(400)[-1:]
        self.assertTrue(fin.flags.F)
        self.assertEqual(fin.seq, self.ack + 5)
        self.assertEqual(self.segment("A", seq=self.seq + 6, ack=self.ack + 6), [])
        self.assertEqual(self.ticks(5000), [])
        self.assertTrue(self.segment("A")[0].flags.R)

    def test_closeAtOnce(self):
        """Data and FIN in one segment."""
        self.connect()
        data, fin = self.segment("FPA", b"bye")
        self.assertEqual((data.data, data.ack), (b"bye", self.seq + 4))
        self.assertEqual((str(fin.flags), fin.seq), ("FA", self.ack + 3))
        again = self.ticks(200)
        self.assertEqual([answer.data for answer in again], [b"bye", b""])
        self.assertTrue(again[-1].flags.F)
        self.assertEqual(self.segment("A", seq=self.seq + 4, ack=self.ack + 4), [])
        self.assertTrue(self.segment("A")[0].flags.R)

    def test_reset(self):
        """Exactly the next number resets; one in the window is asked back (RFC 5961), others are nothing."""
        self.connect()
        (challenge,) = self.segment("R", seq=self.seq + 10)
        self.assertEqual((str(challenge.flags), challenge.ack), ("A", self.seq))
        self.assertEqual(self.segment("R", seq=self.seq - 10), [])
        self.assertEqual(self.say(b"alive"), b"alive")
        self.assertEqual(self.segment("R"), [])
        self.assertTrue(self.segment("A")[0].flags.R)

    def test_closedStaysClosed(self):
        """A connection that ended is not in the state: a restored machine does not know it either."""
        self.connect()
        self.segment("R")
        self.machine = self.restored()
        self.assertTrue(self.segment("A")[0].flags.R)

    def test_slotsAndOrder(self):
        """Which slot is taken, and whose timer goes first, follows from the state alone."""
        for n in [0, 1, 2]:
            self.port, self.seq = 2000 + n, 1000
            self.connect()
            if n == 0:
                gone = self.port, self.seq, self.ack
        self.port, self.seq, self.ack = gone
        self.segment("R")
        for machine in (self.machine, self.restored()):
            self.machine = machine
            for self.port in [2003, 2004]:
                self.seq = 1000
                self.segment("S")
            ports = [answer.dport for answer in self.ticks(200)]
            self.assertEqual(ports, [2003, 2004])
            pages = getattr(self, "pages", machine.memory.pages)
            self.assertTrue((pages == machine.memory.pages).all())
            self.pages = pages

    def restored(self):
        content = self.machine.memory.pages.reshape(-1).copy()
        return Machine.restore(content, self.machine.deviceState(), self.out.append)

    def test_syn(self):
        """A SYN sent again is answered again; one amid the connection is asked back."""
        (one,) = self.segment("S")
        (two,) = self.segment("S")
        self.assertEqual((one.seq, one.ack), (two.seq, two.ack))
        (three,) = self.ticks(200)
        self.assertEqual((three.seq, str(three.flags)), (one.seq, "SA"))
        self.seq, self.ack = self.seq + 1, one.seq + 1
        self.segment("A")
        (challenge,) = self.segment("S", seq=5_000_000)
        self.assertEqual((str(challenge.flags), challenge.ack), ("A", self.seq))
        self.assertEqual(self.segment("R", seq=challenge.ack), [])
        self.seq = 5_000_000
        self.connect()

    def test_wrongHandshake(self):
        """An acknowledgment of a SYN we did not send is reset, and the real one still works."""
        (synAck,) = self.segment("S")
        (reset,) = self.segment("A", seq=self.seq + 1, ack=synAck.seq + 100)
        self.assertEqual((str(reset.flags), reset.seq), ("R", synAck.seq + 100))
        (echo,) = self.segment("PA", b"x", seq=self.seq + 1, ack=synAck.seq + 1)
        self.assertEqual(echo.data, b"x")

    def test_ackOfTheFuture(self):
        """An acknowledgment of what was never sent is answered, and changes nothing."""
        self.connect()
        (answer,) = self.segment("PA", b"x", ack=self.ack + 1000)
        self.assertEqual((answer.data, answer.ack), (b"", self.seq))
        self.assertEqual(self.say(b"x"), b"x")

    def test_strays(self):
        """Segments nobody waits for are reset, resets are not."""
        (answer,) = self.segment("S", dport=80)
        self.assertEqual((str(answer.flags), answer.ack), ("RA", self.seq + 1))
        (answer,) = self.segment("A", b"abc", ack=77)
        self.assertEqual((str(answer.flags), answer.seq), ("R", 77))
        self.assertEqual(self.segment("R"), [])
        self.assertEqual(self.segment("F")[0].ack, self.seq + 1)

    def test_manyConnections(self):
        """Connections do not disturb each other; with all slots busy only one silent for long gives way."""
        peers = []
        for n in range(32):
            self.port, self.seq = 2000 + n, 7000 * n
            self.connect()
            peers.append((self.port, self.seq, self.ack))
        self.assertEqual(self.segment("S", sport=9999), [])
        self.ticks(30_000)
        for n, (self.port, self.seq, self.ack) in enumerate(peers):
            if n != 5:
                self.assertEqual(self.say(b"%d" % n), b"%d" % n)
                self.ack += len(b"%d" % n)
                self.segment("A")
        self.assertEqual(self.segment("S", sport=9999), [])
        self.ticks(31_000)
        self.assertEqual(len(self.segment("S", sport=9999)), 1)
        self.port, self.seq, self.ack = peers[5]
        self.assertTrue(self.segment("A")[0].flags.R)

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.tuples(
                    st.sampled_from(["A", "PA", "PA", "FA", "S", "R", "FPA", "SA", ""]),
                    st.sampled_from([0, 0, 0, 1, -1]) | st.integers(-2000, 2000),
                    st.sampled_from([0, 0, 0, 1, -1]) | st.integers(-2000, 2000),
                    st.integers(0, 1460),
                    st.sampled_from([0, 1, 1000, 65535]),
                ),
                st.integers(1, 40),
            ),
            max_size=15,
        )
    )
    def test_restoredGoesOnAlike(self, script):
        """
        Whatever happens, a machine restored from RAM and device state answers the next thing as the original
        does, and what is acknowledged is what was in the stream.
        """
        machine = Machine.powerOn(SMALL, self.out.append)
        seq, ack = self.isn + 1, None
        self.out.clear()
        machine.receive([self.raw("S", self.isn, 0, 0, 65535)])
        for step in script:
            for frame in self.out:
                number, acknowledged = struct.unpack_from(">II", frame, 38)
                if ack is None:
                    ack = number + 1
                seq = acknowledged or seq
            twinOut = []
            content = machine.memory.pages.reshape(-1).copy()
            twin = Machine.restore(content, machine.deviceState(), twinOut.append)
            self.out.clear()
            for each in (machine, twin):
                if isinstance(step, int):
                    for _ in range(step):
                        each.tick()
                else:
                    flags, seqOff, ackOff, length, window = step
                    each.receive([self.raw(flags, seq + seqOff, ack + ackOff, length, window)])
            self.assertEqual(self.out, twinOut)
            self.assertTrue((machine.memory.pages == twin.memory.pages).all())

    def raw(self, flags, seq, ack, length, window):
        """A segment without scapy, which is slow."""
        bits = sum({"F": 1, "S": 2, "R": 4, "P": 8, "A": 16}[flag] for flag in flags)
        ends = bytes([10, 77, 0, 1, 10, 77, 0, 2])
        tcp = struct.pack(">HHIIBBHHH", 9, 7, seq % 2**32, ack % 2**32, 80, bits, window, 0, 0) + bytes(
            length
        )
        mark = checksum(ends + struct.pack(">HH", 6, len(tcp)) + tcp)
        tcp = tcp[:16] + struct.pack(">H", mark) + tcp[18:]
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + ends
        ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
        return bytes(Ether(src=PEER_MAC, dst=MAC, type=0x800))[:14] + ip + tcp


class OptionsTests(SynchronousTestCase):
    """TCP options of a SYN."""

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=40))
    def test_anything(self, options):
        """Malformed options do not make it fail, nor give a useless MSS."""
        memory = Machine.powerOn(SMALL, lambda frame: None).memory
        sent = []
        echo = TcpEcho(memory, 4096, 1, MSS, lambda mac, peer, segment: sent.append(segment))
        options += bytes(-len(options) % 4)
        header = struct.pack(">HHIIBBHHH", 9, 7, 1, 0, (5 + len(options) // 4) << 4, 2, 1000, 0, 0)
        echo.receive(bytes(6), bytes(4), header + options, 0)
        self.assertEqual(len(sent), 1)
