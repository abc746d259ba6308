"""
A frame port on a TAP device of the Linux kernel.

The device's set-up goes through the ioctls of C{linux/if_tun.h} and C{linux/sockios.h}, with no help of other
programs. This module does not know what is in a frame.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from colotx._portbase import HIGH_WATER, MAX_FRAME, QUEUE_LIMIT, BasePort
from colotx.errors import ConfigError
from colotx.interfaces import IFramePort

# linux/if_tun.h, linux/if.h, linux/sockios.h, linux/rtnetlink.h, linux/if_link.h
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_UP = 0x1
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFMTU = 0x8922
_SIOCGIFINDEX = 0x8933
_SIOCBRADDIF = 0x89A2
_RTM_GETLINK = 18
_NLM_F_REQUEST = 1
_IFLA_MASTER = 10

_FRAMES_A_TURN = 64
"""How many frames are read before other descriptors get their turn."""


def checkInterfaceName(name: str) -> str:
    """
    @return: the name.
    @raise ConfigError: Linux takes no such interface name.
    """
    if (
        not 0 < len(os.fsencode(name)) <= 15
        or name in (".", "..")
        or any(c in "/:%" or c <= " " for c in name)
    ):
        raise ConfigError(f"{name!r} is no interface name: 1 to 15 bytes, without blanks, '/', ':' and '%'")
    return name


@implementer(IFramePort, IReadWriteDescriptor)
class TapPort(BasePort):
    """
    A TAP device: made if it does not exist (and then gone when closed), otherwise the existing one is used,
    which needs no privilege if it is persistent, up and belongs to our user. What the kernel queues for us while
    paused is bounded by its C{txqueuelen}; beyond that it drops, as a real network would.

    @ivar name: the device's name.
    @ivar bridge: the bridge it joins, or None.
    @ivar mtu: its MTU in bytes, or None to leave it.
    """

    def __init__(self, reactor: Any, name: str, bridge: str | None = None, mtu: int | None = None) -> None:
        self._reactor = reactor
        self.name = checkInterfaceName(name)
        self.bridge = None if bridge is None else checkInterfaceName(bridge)
        self.mtu = mtu
        self._descriptor = -1
        self._paused = False
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._buffer = bytearray(MAX_FRAME)

    def __str__(self) -> str:
        return f"tap:{self.name}"

    @property
    def congested(self) -> bool:
        return self._queued > HIGH_WATER

    def open(self) -> Deferred[None]:
        """@raise ConfigError: no TAP here, no permission, name in use or no such bridge; the text says which."""
        try:
            self._descriptor = _openTap(self.name)
            _configure(self.name, self.bridge, self.mtu)
        except ConfigError as error:
            self._closeDescriptor()
            return fail(error)
        if not self._paused:
            self._reactor.addReader(self)
        return succeed(None)

    def close(self) -> Deferred[None]:
        self.connectionLost(connectionDone)
        return succeed(None)

    def send(self, frames: Sequence[bytes]) -> None:
        if self._descriptor < 0:
            self._drop(len(frames), "the device is not open")
            return
        for frame in frames:
            if not self._queue and self._write(frame):
                continue
            if self._queued + len(frame) > QUEUE_LIMIT:
                self._drop(1, f"the device takes no more, {QUEUE_LIMIT} bytes are waiting for it")
                continue
            if not self._queue:
                self._reactor.addWriter(self)
            self._queue.append(frame)
            self._queued += len(frame)

    def _write(self, frame: bytes) -> bool:
        """@return: False if the frame has to wait."""
        try:
            os.write(self._descriptor, frame)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            # Down (EIO), shorter than an Ethernet header (EINVAL), no memory: lost, as on a real NIC.
            self._drop(1, f"the device refused one: {error.strerror}")
        return True

    def pause(self) -> None:
        self._paused = True
        if self._descriptor >= 0:
            self._reactor.removeReader(self)

    def resume(self) -> None:
        self._paused = False
        if self._descriptor >= 0:
            self._reactor.addReader(self)

    def drain(self) -> None:
        while self._descriptor >= 0 and self._readSome():
            pass

    def _readSome(self) -> bool:
        """@return: whether there may be more."""
        frames: list[bytes] = []
        view = memoryview(self._buffer)
        try:
            while len(frames) < _FRAMES_A_TURN:
                frames.append(bytes(view[: os.readv(self._descriptor, [view])]))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._fail(ConfigError(f"{self.name}: the TAP device is gone: {error.strerror}"))
            self.connectionLost(connectionDone)
        self._deliver(frames)
        return len(frames) == _FRAMES_A_TURN

    def doRead(self) -> None:
        self._readSome()

    def doWrite(self) -> None:
        while self._queue and self._write(self._queue[0]):
            self._queued -= len(self._queue.popleft())
        if not self._queue:
            self._reactor.removeWriter(self)

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return str(self)

    def connectionLost(self, reason: Failure) -> None:
        if self._descriptor < 0:
            return
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        if self._queue:
            self._drop(len(self._queue), "the device was closed")
        self._queue.clear()
        self._queued = 0
        self._closeDescriptor()

    def _closeDescriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _openTap(name: str) -> int:
    """@return: a non-blocking descriptor of the TAP device. @raise ConfigError: there is none to have."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"{name}: /dev/net/tun cannot be opened ({error.strerror}): load the kernel module 'tun', and give "
            "a container this device"
        ) from error
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"{name}: no TAP device of this name: {_TAP_HINTS.get(error.errno or 0, error)}"
        ) from error
    return descriptor


_TAP_HINTS = {
    errno.EPERM: "not permitted: run as root (CAP_NET_ADMIN), or make it before with "
    "'ip tuntap add dev NAME mode tap user USER'",
    errno.EBUSY: "another process (another daemon, a QEMU) has it open: stop that, or choose another name",
    errno.EINVAL: "an interface of this name exists and is no single-queue TAP device: choose another name",
}


def _configure(name: str, bridge: str | None, mtu: int | None) -> None:
    """Set MTU, join the bridge, set it up. What is so already is left alone: that needs no privilege."""
    request = struct.Struct("16si20x")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:

        def call(number: int, interface: str, value: int = 0) -> int:
            answer = fcntl.ioctl(control, number, request.pack(interface.encode(), value))
            return int(request.unpack(answer)[1])

        step = "set its MTU"
        try:
            if mtu is not None:
                call(_SIOCSIFMTU, name, mtu)
            if bridge is not None:
                step = f"add it to the bridge {bridge}"
                index = call(_SIOCGIFINDEX, name)
                if _masterOf(index) != call(_SIOCGIFINDEX, bridge):
                    call(_SIOCBRADDIF, bridge, index)
            step = "set it up"
            flags = call(_SIOCGIFFLAGS, name)
            if not flags & _IFF_UP:
                call(_SIOCSIFFLAGS, name, flags | _IFF_UP)
        except OSError as error:
            hint = error.strerror
            if error.errno == errno.ENODEV:
                hint = "there is no such bridge: make it first with 'ip link add NAME type bridge'"
            elif error.errno == errno.EOPNOTSUPP:
                hint = "that is no bridge"
            elif error.errno == errno.EBUSY:
                hint = "it is in another bridge already: take it out with 'ip link set dev NAME nomaster'"
            elif error.errno == errno.EPERM:
                hint = "not permitted: run as root (CAP_NET_ADMIN), or prepare the device beforehand"
            raise ConfigError(f"{name}: cannot {step}: {hint}") from error


def _masterOf(index: int) -> int:
    """
    Ask rtnetlink (which, unlike a sysfs mounted elsewhere, always answers for our own network namespace).

    @return: the interface index of the bridge this interface is in, or 0.
    """
    request = struct.pack("=IHHIIBxHiII", 32, _RTM_GETLINK, _NLM_F_REQUEST, 0, 0, 0, 0, index, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as netlink:
        netlink.settimeout(1.0)
        netlink.send(request)
        answer = netlink.recv(1 << 16)
    position = len(request)
    while position + 8 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, position)
        if kind == _IFLA_MASTER:
            return int(struct.unpack_from("=i", answer, position + 4)[0])
        position += max(4, length + 3 & ~3)
    return 0
