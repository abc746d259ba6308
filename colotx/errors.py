"""
Every error colotx raises on purpose, in one tree.

Each class says whose fault it is; each message says what happened and, where the reader can act, what to do::

    ColoError
     +-- ConfigError                the operator's: a wrong option, file or certificate; exit 1
     |    +-- CertificateError
     +-- PeerError                  the other daemon's, or the network's
     |    +-- ProtocolError         it broke the COLO message exchange
     |    |    +-- InvalidMessage       a message number of 7 or above
     |    |    +-- UnexpectedMessage    a valid message at the wrong place
     |    |    +-- OversizeError        a size field beyond its limit
     |    |    +-- TruncatedError       the channel ended within a message, a section or a blob
     |    +-- StreamError           it broke the grammar of the migration stream
     |    |    +-- UnsupportedStream    a grammar we name and refuse (multifd, compress, postcopy)
     |    +-- HelloRefused          one side refused the other's hello; carries the reason
     |    +-- PeerLost              the channel is gone
     |    +-- PeerTimeout           it did not answer in time
     +-- GuestError                 the local guest's (QEMU died, QMP refused, the guest did not stop in time)
     |    +-- GuestLost
     |    +-- GuestTimeout
     |    +-- QmpError              QEMU answered a command with an error; carries its class and description
     +-- StorageError               disk or memory full, a file that cannot be written
     +-- FailoverError              a failover that cannot be: no COLO mode, already activated
"""


class ColoError(Exception):
    """Base of all errors colotx raises on purpose. C{str()} of it is one line fit for an operator."""


class ConfigError(ColoError):
    """An option, configuration file or environment that cannot work. The operator must change it."""


class CertificateError(ConfigError):
    """A certificate or key that is missing, unreadable, expired or for another name."""


class PeerError(ColoError):
    """The other daemon, or the network to it, failed us."""


class ProtocolError(PeerError):
    """The peer broke the COLO message exchange."""


class InvalidMessage(ProtocolError):
    """A message number that does not exist (7 or above)."""


class UnexpectedMessage(ProtocolError):
    """A valid COLO message where another was due."""


class OversizeError(ProtocolError):
    """A size announced by the peer is beyond the limit."""


class TruncatedError(ProtocolError):
    """The channel ended in the middle of something."""


class StreamError(PeerError):
    """Bytes that are no migration stream, or one that does not fit the guest."""


class UnsupportedStream(StreamError):
    """A migration stream in a grammar COLO does not use (multifd, compress, postcopy)."""


class HelloRefused(PeerError):
    """
    The two daemons do not fit: version, VM name, role, identity or epoch.

    @ivar reason: the refusing side's words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PeerLost(PeerError):
    """The link to the peer is gone."""


class PeerTimeout(PeerError):
    """The peer did not do its part of the exchange in time."""


class GuestError(ColoError):
    """The local guest, or the hypervisor under it, failed."""


class GuestLost(GuestError):
    """The local guest's process is gone."""


class GuestTimeout(GuestError):
    """The local guest did not do what it was told in time."""


class QmpError(GuestError):
    """
    An error answer to a QMP command.

    @ivar errorClass: QMP's error class, such as C{GenericError}.
    @ivar description: QMP's description.
    """

    def __init__(self, errorClass: str, description: str) -> None:
        super().__init__(f"{errorClass}: {description}")
        self.errorClass = errorClass
        self.description = description


class StorageError(ColoError):
    """Something could not be stored: no room, or a file that cannot be written."""


class FailoverError(ColoError):
    """A failover was asked for that cannot be done."""
