"""Makes the service known to twistd as C{colo}."""

from twisted.application.service import ServiceMaker

colo = ServiceMaker(  # type: ignore[no-untyped-call]
    "colotx",
    "colotx.tap",
    "Keep a virtual machine's service running through the death of its host.",
    "colo",
)
