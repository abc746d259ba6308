"""What the acceptance tests share: what they need of a machine, and how they wait. The cases are elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.trial.unittest import SkipTest

from colotx.errors import ConfigError
from colotx.lab.namespaces import isPrivileged
from colotx.lab.pair import GuestChoice, qemuGuest


def needPrivileges() -> None:
    """@raise SkipTest: this user may not make network namespaces."""
    if not isPrivileged():
        raise SkipTest("network namespaces need root: run the acceptance tests as root")


def needQemuGuest(patternBytes: int = 512 << 10, firstTcp: bool = True) -> GuestChoice:
    """
    @param patternBytes: how much memory the guest checks.
    @param firstTcp: see L{colotx.lab.guestimage.kernelArguments}.
    @return: the checking Linux guest.
    @raise SkipTest: a part of it is missing.
    """
    try:
        return qemuGuest(patternBytes=patternBytes, firstTcp=firstTcp)
    except ConfigError as error:
        raise SkipTest(str(error)) from None


def asynchronous(
    method: Callable[..., Coroutine[Deferred[Any], Any, None]],
) -> Callable[..., Deferred[None]]:
    """Lets a test method be a coroutine."""

    @functools.wraps(method)
    def run(*arguments: Any) -> Deferred[None]:
        return ensureDeferred(method(*arguments))

    return run
