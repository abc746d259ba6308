"""
The secondary guest's TCP connections in the words of the primary's: sequence numbers and time stamps.

A connection that both guests opened after the last checkpoint has two initial sequence numbers, and, when the guest
made its secret for time stamps after the checkpoint, two time-stamp offsets (RFC 7323, 5.4). Clients know the
primary's. L{Translator} learns the differences from what passes anyway::

    the guest accepts     its SYN-ACK (seq, TSval)   against   the client's first ACK (ack - 1, TSecr)
    the guest connects    its SYN (seq, TSval)       against   the client's SYN-ACK or RST (ack - 1, TSecr)

From then on output has C{seq} and C{TSval} moved into the client's space, input C{ack}, SACK blocks, C{TSecr} and the
sequence number that an ICMP error quotes into the guest's. It lives as long as the connection: a guest that goes on
after a failover still needs it, and so does its next secondary (L{Translator.export}, L{Translator.adopt}).

Time stamps have two readers that must not be told nonsense:

  - The client drops what has a TSval below the last it took (C{tcp_paws_check} in Linux' C{tcp.h}; RFC 7323, 5): a
    connection where it runs backwards hangs. So of several SYNs (retransmissions, each with its own TSval) the first
    one counts, which makes the translated clock run ahead of the primary's, not behind. And a TSval is never below the
    highest TSecr of the client: were it, the guest's virtual clock fell behind the primary's, and the difference is
    lowered for good, at that moment, by what is missing.
  - The guest drops a SYN-ACK whose TSecr is not between its SYN and now (C{tcp_rcv_synsent_state_process}), in Linux
    6.15 also an ACK whose TSecr is not between its first and its last SYN-ACK (C{tcp_check_req}). The first SYN
    counting, its own TSval comes back. Later a TSecr ahead of what the guest said last becomes that: it cannot have
    been answered to what it did not say.

What is not learned passes as it is. That is right for connections from before the checkpoint, and it is what the
comparer must see of those that nothing can be learned of (TCP fast open: data before the first ACK).

Sans-IO: this module takes frames and gives frames; it knows no port, no comparer and no checkpoint process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from colotx._segments import (
    ACK,
    FIN,
    MASK,
    RST,
    SYN,
    Segment,
    ahead,
    find,
    findQuote,
    isKey,
    options,
    reverse,
    rewrite,
    timestamps,
    word,
)
from colotx.errors import ProtocolError

JUMP = 1000
"""
By how much time stamps go ahead at a failover, in the guest's ticks (of 1 ms nearly everywhere). The client may hold a
TSval of the primary that it echoed to nobody, and the secondary's virtual clock may be behind the primary's.
"""

_BOTH_FIN = FIN | FIN << 1
_WINDOW = 1 << 16
"""The window of a SYN-ACK is not scaled: what answers it begins within this many bytes."""
_SAME_CLOCK = 1 << 17
"""Ticks: how far an echo may be from what the guest said last to be of the same clock; SYNs are repeated so long."""


@dataclass(frozen=True, slots=True)
class TranslateLimits:
    """
    Bounds of a L{Translator}.

    @ivar connections: entries, and as many handshakes under way.
    @ivar handshake: seconds a SYN waits for its answer.
    @ivar linger: seconds of silence after which an ended connection is forgotten (TIME-WAIT is 60 s in Linux).
    @ivar idle: seconds of silence after which any is.
    """

    connections: int = 16384
    handshake: float = 180.0
    linger: float = 120.0
    idle: float = 5 * 86400.0


@dataclass(slots=True)
class TranslateStatistics:
    """
    Counters since the start.

    @ivar learned: connections whose differences were learned.
    @ivar evicted: live connections forgotten because the table was full: they break at a failover.
    @ivar raised: how often a time stamp had to be raised to the client's last echo.
    """

    learned: int = 0
    evicted: int = 0
    raised: int = 0


@dataclass(slots=True)
class _Connection:
    """
    @ivar key: as in the guest's frames.
    @ivar iss: the guest's initial sequence number; None when its handshake was not seen.
    @ivar first: TSval of its first SYN; None: without time stamps.
    @ivar expected: what its SYN-ACK acknowledged; None: it sent a SYN.
    @ivar seen: when a segment passed last.
    @ivar sequence: guest's less client's sequence numbers; None: not learned yet.
    @ivar time: guest's less client's time stamps; None: not learned yet.
    @ivar said: the guest's last TSval.
    @ivar echoed: the client's highest TSecr.
    @ivar ended: FIN of the guest, FIN << 1 of the client, RST of either.
    """

    key: bytes
    iss: int | None
    first: int | None
    expected: int | None
    seen: float
    sequence: int | None = None
    time: int | None = None
    said: int | None = None
    echoed: int | None = None
    ended: int = 0

    def isOver(self) -> bool:
        return bool(self.ended & RST) or self.ended == _BOTH_FIN


_Spec = tuple[bytes, int | None, int | None, int | None, int | None, int | None]
_NAMES = ("iss", "first", "expected", "sequence", "time")


class Translator:
    """
    Between the secondary's guest and everything else.

    @ivar statistics: L{TranslateStatistics}.
    """

    def __init__(self, clock: Callable[[], float], limits: TranslateLimits = TranslateLimits()) -> None:
        """@param clock: monotonic seconds."""
        self._clock = clock
        self._limits = limits
        self._opening: dict[bytes, _Connection] = {}
        self._known: dict[bytes, _Connection] = {}
        self._inbound: dict[bytes, _Connection] = {}
        self._adopted: dict[bytes, _Spec] = {}
        self._learning = True
        self.statistics = TranslateStatistics()

    def __len__(self) -> int:
        """@return: how many connections are translated."""
        return len(self._known)

    def output(self, frames: Sequence[bytes]) -> list[bytes]:
        """What the guest sent. @return: the same in the client's space; what needs no change is the same object."""
        now = self._clock()
        known, opening = self._known, self._opening
        result = []
        for frame in frames:
            segment = find(frame)
            if segment is not None:
                key = segment.key
                if frame[segment.start + 13] & (SYN | RST | FIN) == SYN:
                    self._opens(frame, segment, now)
                elif key in opening and segment.end > segment.data:
                    self._forget(opening[key])
                connection = known.get(key)
                if connection is not None:
                    frame = self._outward(connection, frame, segment, now)
            result.append(frame)
        return result

    def input(self, frames: Sequence[bytes]) -> list[bytes]:
        """What clients sent. @return: the same in the guest's space; what needs no change is the same object."""
        inbound = self._inbound
        if not inbound:
            return list(frames)
        now = self._clock()
        result = []
        for frame in frames:
            segment = find(frame)
            if segment is None:
                frame = self._quoted(frame)
            else:
                connection = inbound.get(segment.key)
                if connection is not None:
                    frame = self._inward(connection, frame, segment, now)
            result.append(frame)
        return result

    def reset(self) -> None:
        """A checkpoint was loaded: the guest's connections are the primary's. Those adopted stay."""
        now = self._clock()
        for table in (self._opening, self._known, self._inbound):
            table.clear()
        for key, iss, first, expected, sequence, time in self._adopted.values():
            connection = _Connection(key, iss, first, expected, now, sequence, time)
            (self._opening if sequence is None else self._known)[key] = connection
            self._inbound[reverse(key)] = connection

    def promoted(self, live: Iterable[bytes] = ()) -> None:
        """
        The guest goes on alone: what it opens from now on is nobody else's, and nothing is learned of it. Handshakes
        under way are still learned, since clients may know the primary's. All time stamps go ahead by L{JUMP}.

        @param live: keys of connections with time stamps that are to go ahead too, from before the last checkpoint.
        """
        now = self._clock()
        self._learning = False
        for connection in self._known.values():
            if connection.time is not None:
                connection.time = (connection.time - JUMP) & MASK
        for key in live:
            if key not in self._known and key not in self._opening:
                self._keep(_Connection(key, None, None, None, now, 0, -JUMP & MASK))

    def export(self) -> list[dict[str, object]]:
        """@return: what is known, for the translator of this guest's next secondary; JSON-able."""
        now = self._clock()
        return [
            {"flow": connection.key.hex(), **{name: getattr(connection, name) for name in _NAMES}}
            for table in (self._known, self._opening)
            for connection in table.values()
            if not self._isStale(connection, now)
        ]

    def adopt(self, entries: object) -> None:
        """
        Take over what the translator of the primary's guest exported, for the checkpoint that is loaded next or was
        just loaded: it replaces what was adopted before, and all that was learned is forgotten.

        @raise ProtocolError: it is nothing that L{export} makes, or more than fits. Nothing has changed then.
        """
        if not isinstance(entries, list) or len(entries) > self._limits.connections:
            raise ProtocolError("the peer's connections to translate are no list, or more than the limit")
        self._adopted = {spec[0]: spec for spec in map(_checked, entries)}
        self.reset()

    # Learning

    def _opens(self, frame: bytes, segment: Segment, now: float) -> None:
        key, start = segment.key, segment.start
        (iss,) = word(frame, start + 4)
        at = timestamps(frame, segment)
        value = word(frame, at)[0] if at else None
        expected = word(frame, start + 8)[0] if frame[start + 13] & ACK else None
        connection = self._known.get(key) or self._opening.get(key)
        if connection is not None:
            if connection.iss == iss:
                connection.expected = expected
                if value is not None:
                    connection.said = value
                return
            # A new connection on the same ports. Whoever opened it, the guest took the old one to be gone.
            self._adopted.pop(key, None)
            self._forget(connection)
        if not self._learning or segment.end > segment.data:
            return
        while self._opening:
            oldest = next(iter(self._opening.values()))
            if len(self._opening) < self._limits.connections and not self._isStale(oldest, now):
                break
            self._forget(oldest)
        connection = _Connection(key, iss, value, expected, now, said=value)
        self._opening[key] = self._inbound[reverse(key)] = connection

    def _learn(self, connection: _Connection, frame: bytes, segment: Segment, now: float) -> bool:
        """@return: whether the client's segment told the differences, and there are any."""
        start = segment.start
        flags = frame[start + 13]
        if connection.expected is None:
            if not flags & ACK or not flags & (SYN | RST):
                return False
        else:
            # Any other ACK is a straggler of an earlier connection.
            sequence = word(frame, start + 4)[0] + (flags & SYN == SYN)
            if not flags & ACK or (sequence - connection.expected) & MASK >= _WINDOW:
                return False
        assert connection.iss is not None
        connection.sequence = (connection.iss - word(frame, start + 8)[0] + 1) & MASK
        del self._opening[connection.key]
        at = timestamps(frame, segment)
        echo = word(frame, at + 4)[0] if at else 0
        if not connection.sequence and _isSameClock(connection.said, echo):
            # It is the primary's own, from a handshake that the checkpoint held.
            del self._inbound[reverse(connection.key)]
            return False
        self.statistics.learned += 1
        self._keep(connection)
        return True

    # Translating

    def _outward(self, connection: _Connection, frame: bytes, segment: Segment, now: float) -> bytes:
        start = segment.start
        flags = frame[start + 13]
        connection.seen = now
        # After an RST that nobody took the connection goes on.
        connection.ended = connection.ended & _BOTH_FIN | flags & (FIN | RST)
        changes = []
        (sequence,) = word(frame, start + 4)
        # RFC 9293, 3.5.2: an RST answering a segment without ACK has no sequence number.
        if connection.sequence and (sequence or not flags & RST):
            changes.append((start + 4, sequence, (sequence - connection.sequence) & MASK))
        if connection.time is not None and (at := timestamps(frame, segment)):
            (value,) = word(frame, at)
            changes.append((at, value, self._stamp(connection, value)))
        return rewrite(frame, start, start + 16, changes) if changes else frame

    def _stamp(self, connection: _Connection, value: int) -> int:
        assert connection.time is not None
        connection.said = value
        stamp = (value - connection.time) & MASK
        if connection.echoed is not None and (missing := ahead(connection.echoed, stamp)):
            self.statistics.raised += 1
            connection.time = (connection.time - missing) & MASK
            stamp = connection.echoed
        return stamp

    def _inward(self, connection: _Connection, frame: bytes, segment: Segment, now: float) -> bytes:
        if connection.sequence is None and not self._learn(connection, frame, segment, now):
            return frame
        start = segment.start
        flags = frame[start + 13]
        connection.seen = now
        connection.ended |= (flags & FIN) << 1 | flags & RST
        if not flags & ACK:
            return frame
        changes = []
        at, blocks = options(frame, segment)
        if connection.sequence:
            for index in (start + 8, *blocks):
                (number,) = word(frame, index)
                changes.append((index, number, (number + connection.sequence) & MASK))
        if at and (echo := word(frame, at + 4)[0]):
            if connection.time is None and connection.first is not None:
                connection.time = (connection.first - echo) & MASK
            if connection.time is not None:
                changes.append((at + 4, echo, self._unstamp(connection, echo)))
        return rewrite(frame, start, start + 16, changes) if changes else frame

    def _unstamp(self, connection: _Connection, echo: int) -> int:
        assert connection.time is not None
        if connection.echoed is None or ahead(echo, connection.echoed):
            connection.echoed = echo
        value = (echo + connection.time) & MASK
        if connection.said is not None and ahead(value, connection.said):
            return connection.said
        return value

    def _quoted(self, frame: bytes) -> bytes:
        quote = findQuote(frame)
        if quote is None or (connection := self._known.get(quote.key)) is None or not connection.sequence:
            return frame
        (sequence,) = word(frame, quote.sequence)
        change = (quote.sequence, sequence, (sequence + connection.sequence) & MASK)
        return rewrite(frame, quote.start, quote.start + 2, [change])

    # Bounds

    def _keep(self, connection: _Connection) -> None:
        known = self._known
        isFull = len(known) >= self._limits.connections
        # A few of the longest in the table are looked at each time: those over go, the others start again behind.
        candidates = list(islice(known.values(), 64 if isFull else 8))
        for candidate in candidates:
            if self._isStale(candidate, connection.seen):
                self._adopted.pop(candidate.key, None)
                self._forget(candidate)
            else:
                known[candidate.key] = known.pop(candidate.key)
        if len(known) >= self._limits.connections:
            victim = min(candidates, key=lambda candidate: (not candidate.isOver(), candidate.seen))
            self.statistics.evicted += not victim.isOver()
            self._forget(victim)
        known[connection.key] = self._inbound[reverse(connection.key)] = connection

    def _isStale(self, connection: _Connection, now: float) -> bool:
        limits = self._limits
        if connection.sequence is None:
            bound = limits.handshake
        else:
            bound = limits.linger if connection.isOver() else limits.idle
        return now - connection.seen > bound

    def _forget(self, connection: _Connection) -> None:
        (self._opening if connection.sequence is None else self._known).pop(connection.key, None)
        self._inbound.pop(reverse(connection.key), None)


def _isSameClock(said: int | None, echo: int) -> bool:
    if said is None or not echo:
        return True
    return (said - echo + _SAME_CLOCK) & MASK < 2 * _SAME_CLOCK


def _checked(entry: object) -> _Spec:
    if not isinstance(entry, dict) or entry.keys() != {"flow", *_NAMES}:
        raise ProtocolError("a connection to translate lacks a field or has one too many")
    try:
        key = bytes.fromhex(entry["flow"])
    except (TypeError, ValueError):
        key = b""
    numbers = [entry[name] for name in _NAMES]
    fits = all(number is None or (type(number) is int and 0 <= number <= MASK) for number in numbers)
    if not isKey(key) or not fits:
        raise ProtocolError("a connection to translate has a flow or a number that cannot be")
    iss, first, expected, sequence, time = numbers
    if iss is None and sequence is None:
        raise ProtocolError("a connection to translate has nothing to begin from")
    return key, iss, first, expected, sequence, time


__all__ = ["JUMP", "TranslateLimits", "TranslateStatistics", "Translator"]
