"""
A QMP client without a reactor, for command-line tools: plain blocking sockets, every wait with a time-out.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from types import TracebackType

from colotx._qmp_codec import JsonObject, Malformed, QmpCodec, encodeQmp
from colotx.errors import ColoError, QmpError

CONNECT_TIME = 5.0
"""Seconds a daemon has to take the connection and to negotiate."""


class Unreachable(ColoError):
    """No daemon speaks with us at this socket."""


class BlockingQmp:
    """
    A conversation with a daemon, ready for commands. To be used in a C{with} statement.

    @raise Unreachable: nobody answers; says why and what to do.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._codec = QmpCodec()
        self._received: list[JsonObject | Malformed] = []
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(CONNECT_TIME)
            self._socket.connect(path)
            self._receive(time.monotonic() + CONNECT_TIME, "its greeting", "QMP")
            self.execute("qmp_capabilities", timeout=CONNECT_TIME)
        except OSError as error:
            self._socket.close()
            raise Unreachable(_why(path, error)) from error
        except ColoError as error:
            self._socket.close()
            raise Unreachable(f"{path}: {error}") from error

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, timeout: float = 10.0
    ) -> object:
        """
        Carry out a command.

        @param timeout: seconds.
        @raise QmpError: the daemon refused, in its own words.
        @raise Unreachable: the connection ended.
        @raise ColoError: no answer in time; whether the command was carried out is not known.
        """
        deadline = time.monotonic() + timeout
        message: dict[str, object] = {"execute": command}
        if arguments:
            message["arguments"] = dict(arguments)
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(encodeQmp(message))
        except OSError as error:
            raise Unreachable(_why(self._path, error)) from error
        answer = self._receive(deadline, f"the answer to {command}", "return", "error")
        refusal = answer.get("error")
        if isinstance(refusal, dict):
            raise QmpError(str(refusal.get("class")), str(refusal.get("desc")))
        return answer.get("return")

    def __enter__(self) -> BlockingQmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def _receive(self, deadline: float, what: str, *members: str) -> JsonObject:
        """The next message with one of these members; others, such as events, are passed over."""
        while True:
            while self._received:
                message = self._received.pop(0)
                if isinstance(message, Malformed):
                    raise Unreachable(f"{self._path}: not a colotx control socket ({message.reason})")
                if any(member in message for member in members):
                    return message
            try:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                data = self._socket.recv(65536)
            except TimeoutError as error:
                raise ColoError(f"waited for {what} in vain; is the daemon stopped or overloaded?") from error
            except OSError as error:
                raise Unreachable(_why(self._path, error)) from error
            if not data:
                raise Unreachable(f"{self._path}: the daemon closed the connection instead of sending {what}")
            self._received += self._codec.feed(data)


def _why(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such socket; is the daemon running?"
    if isinstance(error, ConnectionRefusedError):
        return f"{path}: nobody answers there; the daemon died and left its socket, start it again"
    if isinstance(error, PermissionError):
        return f"{path}: permission denied; only the daemon's user (or root) may control it"
    return f"{path}: {error.strerror or error}"


__all__ = ["BlockingQmp", "Unreachable"]
