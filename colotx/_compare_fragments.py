"""
Fragments of IP datagrams, put together again for judging.

The two guests number their datagrams differently and may cut them differently; so whole datagrams are compared, and
the primary's fragments leave together. A datagram takes its place in the flow's order when its last fragment came.
Overlapping fragments are never whole (RFC 5722): those of the primary wait for a checkpoint.
"""

from __future__ import annotations

from colotx.packets import Flow, Fragment


class Pieces:
    """
    One datagram of which not all fragments have come.

    @ivar frames: the fragments in order of arrival.
    @ivar number, since: of the first fragment: number and time of arrival.
    """

    __slots__ = ("_data", "_size", "frames", "number", "since")

    def __init__(self, number: int, since: float) -> None:
        self.frames: list[bytes] = []
        self.number = number
        self.since = since
        self._data: dict[int, bytes] = {}
        self._size: int | None = None

    def add(self, frame: bytes, fragment: Fragment, data: bytes) -> bytes | None:
        """@return: the datagram's body if this made it whole."""
        self.frames.append(frame)
        self._data.setdefault(fragment.start, data)
        if not fragment.more:
            self._size = fragment.start + len(data)
        if self._size is None or sum(map(len, self._data.values())) < self._size:
            return None
        body = b""
        for start in sorted(self._data):
            if start != len(body):
                return None
            body += self._data[start]
        return body if len(body) == self._size else None


class Reassembly:
    """
    The incomplete datagrams of one side.

    @ivar incomplete: by flow and identification, in order of arrival.
    """

    def __init__(self) -> None:
        self.incomplete: dict[tuple[Flow, int], Pieces] = {}

    def add(
        self, frame: bytes, flow: Flow, fragment: Fragment, data: bytes, number: int, since: float
    ) -> tuple[Pieces, bytes] | None:
        """@return: the datagram and its body if this fragment made it whole."""
        key = (flow, fragment.identification)
        pieces = self.incomplete.get(key)
        if pieces is None:
            pieces = self.incomplete[key] = Pieces(number, since)
        body = pieces.add(frame, fragment, data)
        if body is None:
            return None
        del self.incomplete[key]
        return pieces, body

    def forgetOldest(self) -> None:
        """Forget the incomplete datagram that came first."""
        del self.incomplete[next(iter(self.incomplete))]

    def expire(self, before: float) -> None:
        """Forget those that began before this time."""
        for key in [key for key, pieces in self.incomplete.items() if pieces.since < before]:
            del self.incomplete[key]
