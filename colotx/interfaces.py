"""
The seams of colotx: everything that has, or will have, more than one implementation.

This module knows names, units and order of calls. It imports nothing of colotx, and it must not know the command
line, sockets or QEMU.

Words: the B{primary} guest is the VM that serves clients; the B{secondary} guest is what stands by on the other
host. A B{checkpoint} is RAM, device state and their sizes at one instant. An B{epoch of output} is what the
primary guest sent between two stops; a B{generation} (called C{epoch} in hello messages and in the state file)
counts failovers.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from zope.interface import Attribute, Interface


class RunState(enum.Enum):
    """The run states of a guest that colotx tells apart, under the names QMP's C{query-status} uses."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    COLO = "colo"
    """Stopped for a checkpoint."""
    SHUTDOWN = "shutdown"
    """The guest is gone."""


class ColoMode(enum.Enum):
    """What C{query-colo-status} calls mode and last-mode."""

    NONE = "none"
    PRIMARY = "primary"
    SECONDARY = "secondary"


class Sink(Protocol):
    """Where a primary guest writes its state, already in the bytes of QEMU's migration stream."""

    async def write(self, data: bytes | memoryview) -> None:
        """
        Take the next bytes. Returns when more may come (backpressure). The sink copies what it keeps.

        @raise colotx.errors.ColoError: the sink can take no more, ever.
        """


class IRunControl(Interface):
    """Stop and go on."""

    runState = Attribute("The L{RunState} of the guest now.")

    def stop():  # type: ignore[no-untyped-def]
        """
        Stop the guest for a checkpoint. Its NIC's output is complete when this fires (see
        L{IFramePort.drain} for what may still sit in a socket).

        @return: a Deferred that fires when no virtual CPU runs and the run state is C{COLO}.
        @raise colotx.errors.GuestTimeout: it did not stop in time; the guest runs on.
        """

    def start():  # type: ignore[no-untyped-def]
        """
        Let the guest run on after C{stop}. Harmless when it runs.

        @return: a Deferred that fires when it runs.
        """

    def pause():  # type: ignore[no-untyped-def]
        """
        The operator's C{stop}, of a guest that is not protected. @return: a Deferred that fires when no virtual CPU
        runs; the run state is C{PAUSED}.
        """

    def unpause():  # type: ignore[no-untyped-def]
        """The operator's C{cont}. @return: a Deferred that fires when it runs."""


class ILiveState(Interface):
    """The RAM of a primary guest."""

    def transferInitial(sink):  # type: ignore[no-untyped-def]
        """
        Write the whole initial stream (C{initial} in QEMU-FACTS' grammar: header, configuration, RAM while the
        guest runs, then RAM and device sections with the guest stopped, EOF, vmdesc). When this fires, all of it
        was written, the guest is stopped (run state C{COLO}) and stays so until C{start}.

        @type sink: L{Sink}
        @return: a Deferred.
        """

    def transferLive(sink):  # type: ignore[no-untyped-def]
        """
        Between C{stop} and C{start}: write the RAM part of a checkpoint (an END(ram) section and the EOF byte),
        all pages dirtied since the checkpoint before.

        @type sink: L{Sink}
        @return: a Deferred.
        """


class IDeviceState(Interface):
    """Everything of a primary guest that is not RAM."""

    def saveDeviceState():  # type: ignore[no-untyped-def]
        """
        After C{transferLive}: the device-state blob (FULL sections and EOF).

        @return: a Deferred firing with C{bytes}.
        """


class IPrimaryGuest(IRunControl, ILiveState, IDeviceState):
    """
    A guest that can serve clients and be protected.

    Order of calls: C{launch} once; then any number of protections, each C{transferInitial}, C{start},
    (C{stop}, C{transferLive}, C{saveDeviceState}, C{start})*, C{endProtection}; C{shutdown} at the end.
    """

    port = Attribute("L{IFramePort}: the guest's side of the NIC. Frames received from it left the guest.")
    ramBytes = Attribute("int: the guest's RAM in bytes, for estimates and limits.")
    onLost = Attribute(
        "None or a callable taking a L{colotx.errors.GuestError}: called once when the guest died by itself."
    )
    onCheckpointWanted = Attribute(
        "None or a callable taking a str (reason): the guest's own hypervisor asks for an early checkpoint."
    )

    def launch():  # type: ignore[no-untyped-def]
        """
        Make the guest run: power it on, or (when made by an L{ISecondaryGuest.promote}) go on from the state it
        was made from.

        @return: a Deferred that fires when it runs.
        @raise colotx.errors.GuestError: with the hypervisor's own words.
        """

    def endProtection():  # type: ignore[no-untyped-def]
        """
        Leave COLO mode at any point of the exchange, even in the middle of C{transferLive}: the guest runs on
        from where it is, nothing of ours keeps it frozen, both directions of its COLO transport are shut down,
        whatever waited on it errbacks. Harmless when it is not protected.

        @return: a Deferred that fires when the guest runs.
        """

    def shutdown():  # type: ignore[no-untyped-def]
        """
        End the guest for good, with a time limit, then by force.

        @return: a Deferred that never fails.
        """


class ISecondaryGuest(Interface):
    """
    What stands by on the secondary host: a RAM image (passive) or a running VM (active). Nothing is applied
    before it is whole: C{stageInitial}/C{stageLive} only stage, C{commit} makes the checkpoint the current one.
    """

    kind = Attribute("'passive' or 'active'.")
    checkpoint = Attribute("int: how many checkpoints were committed, the initial one included; 0: none yet.")
    promotable = Attribute("bool: whether C{promote} has something to go on from.")

    def stageInitial(raw, events):  # type: ignore[no-untyped-def]
        """
        The next bytes of the initial stream, and what the reader made of them. Arrays in the events are only
        valid until this returns.

        @type raw: L{bytes} or L{memoryview}
        @type events: a sequence of L{colotx.vmstate.RamEvent}
        @return: an awaitable or None; more is fed when it is done (backpressure).
        @raise colotx.errors.StorageError: no room.
        """

    def stageLive(raw, events):  # type: ignore[no-untyped-def]
        """The same for the RAM part of a checkpoint."""

    def describe(machine, configuration):  # type: ignore[no-untyped-def]
        """
        The initial stream is whole: what it said of the machine, told before the C{commit} that makes it current.

        @type machine: L{str}
        @param configuration: the raw configuration section, see L{CheckpointImage}.
        """

    def prepare():  # type: ignore[no-untyped-def]
        """REQUEST arrived: be ready to stage (an active secondary stops its VM). @return: a Deferred."""

    def commit(deviceState):  # type: ignore[no-untyped-def]
        """
        Everything arrived. From the moment this fires, C{promote} would go on from this checkpoint.

        @param deviceState: the device-state blob, L{bytes}.
        @return: a Deferred.
        """

    def settle():  # type: ignore[no-untyped-def]
        """
        After RECEIVED was sent: do the work that follows a commit (flush the RAM cache, load the state, start an
        active VM). @return: a Deferred, after which LOADED may be sent.
        """

    def abandon():  # type: ignore[no-untyped-def]
        """Forget what is staged; the committed checkpoint stays. Never fails, harmless when nothing is staged."""

    def promote():  # type: ignore[no-untyped-def]
        """
        Failover: make a guest of the last committed checkpoint (after finishing a C{settle} under way).

        @return: a Deferred firing with an L{IPrimaryGuest} whose C{launch} was not called yet.
        @raise colotx.errors.FailoverError: nothing was ever committed.
        """

    def close():  # type: ignore[no-untyped-def]
        """Free everything. @return: a Deferred that never fails."""


class IActiveSecondary(ISecondaryGuest):
    """
    A running VM that stands by: it gets every input frame, and what it says is compared.

    Its VM stops at C{prepare} and runs again when C{settle} fires. C{abandon} after C{prepare} leaves it stopped, and
    C{promote} then goes on from its own state: all that left the primary until then, it has said too. A VM that failed
    to load is never promoted.
    """

    port = Attribute(
        "L{IFramePort}: the running guest's NIC. Frames pass from the first C{settle} on, in the sequence and time "
        "stamp space of the primary's clients."
    )


@dataclass(frozen=True, slots=True)
class CheckpointImage:
    """
    A committed checkpoint, whole, as a passive secondary hands it to the launcher of its kind of guest.

    @ivar machine: machine name of the stream's configuration section, such as C{pc-i440fx-7.2}.
    @ivar configuration: the raw configuration section (07 ... , without the 8 byte file header).
    @ivar ram: the RAM cache (L{colotx.ramcache.RamCache}): block list, image files, contents.
    @ivar deviceState: the device-state blob.
    """

    machine: str
    configuration: bytes
    ram: object
    deviceState: bytes


class IGuestFactory(Interface):
    """Makes guests of one kind (C{memory}, C{qemu}) from the operator's settings."""

    def createPrimary():  # type: ignore[no-untyped-def]
        """@return: an L{IPrimaryGuest} that will boot afresh when launched."""

    def createStandby(kind="passive"):  # type: ignore[no-untyped-def]
        """
        @param kind: C{passive} or C{active}.
        @return: a fresh empty L{ISecondaryGuest} on the secondary host; an L{IActiveSecondary} if it is active.
        """


class IFramePort(Interface):
    """
    A port that carries Ethernet frames: the guest's NIC or the outside (TAP, unix socket). Frames are C{bytes}
    without length prefix and without FCS.
    """

    receiver = Attribute(
        "None or a callable taking a list of frames: called in order of arrival, never empty."
    )

    def send(frames):  # type: ignore[no-untyped-def]
        """
        Send frames in order.

        @type frames: sequence of L{bytes}
        @return: None. What the other end cannot take now waits in a bounded queue; C{congested} tells.
        """

    congested = Attribute(
        "bool: the sending queue is above its high-water mark; a caller that can wait should."
    )

    def pause():  # type: ignore[no-untyped-def]
        """Receive no more until C{resume}; the sender on the other side is held back, nothing is dropped here."""

    def resume():  # type: ignore[no-untyped-def]
        """Undo C{pause}. Harmless when not paused."""

    def drain():  # type: ignore[no-untyped-def]
        """
        Read everything that has already arrived, now, also when paused, and give it to C{receiver} before
        returning. Never waits.
        """

    def open():  # type: ignore[no-untyped-def]
        """@return: a Deferred that fires when frames can pass. @raise colotx.errors.ConfigError: it cannot be."""

    def close():  # type: ignore[no-untyped-def]
        """Release everything. @return: a Deferred that never fails."""


class IOutputGate(Interface):
    """
    Output commit: frames of the primary guest wait here until they may leave. Bounded: at the high-water mark an
    early checkpoint is asked for, at the limit the guest's port is paused; no frame is dropped.
    """

    def hold(frames):  # type: ignore[no-untyped-def]
        """Frames the primary guest sent, in order. They leave at once when the gate is open."""

    def closeEpoch():  # type: ignore[no-untyped-def]
        """
        The guest is stopped and its port drained: what is held now belongs to the checkpoint being taken.

        @return: int, the number of the epoch just closed.
        """

    def release(epoch):  # type: ignore[no-untyped-def]
        """The peer holds the checkpoint of this epoch: its frames, and all before, leave in order."""

    def open():  # type: ignore[no-untyped-def]
        """Unprotected: let everything held, and everything that comes, leave."""

    def shut():  # type: ignore[no-untyped-def]
        """Protected again: frames wait from now on."""


class IFrameRelay(Interface):
    """
    The frames of an active secondary, driven by the primary's checkpoint process. For each checkpoint C{hold},
    C{closeEpoch}, C{resume}, in this order; C{number} counts them, 0 is the initial transfer (which has no C{hold}).
    """

    def hold():  # type: ignore[no-untyped-def]
        """REQUEST is about to be sent: no more input to either VM."""

    def closeEpoch(number):  # type: ignore[no-untyped-def]
        """Both VMs are stopped and the primary's port is drained: compare no more of what they said until now."""

    def resume(number):  # type: ignore[no-untyped-def]
        """Both VMs run from checkpoint C{number}: what was held goes to both."""

    def end():  # type: ignore[no-untyped-def]
        """The protection is over; the primary's VM gets what was held."""


class IReplication(Interface):
    """Disk replication, driven by the checkpoint process (the COLO framework's replication_*_all)."""

    def startAll(mode):  # type: ignore[no-untyped-def]
        """@type mode: L{ColoMode}. @return: a Deferred."""

    def doCheckpointAll():  # type: ignore[no-untyped-def]
        """The guest is stopped: what was written so far belongs to this checkpoint. @return: a Deferred."""

    def stopAll(failover):  # type: ignore[no-untyped-def]
        """@param failover: bool: go on from the last checkpoint's disk. @return: a Deferred."""

    def getErrorAll():  # type: ignore[no-untyped-def]
        """@raise colotx.errors.StorageError: replication is broken, with the reason."""


@dataclass(frozen=True, slots=True)
class Grant:
    """
    An arbiter's leave to go on alone.

    @ivar epoch: the new generation, one above the last.
    @ivar source: who granted it: an operator, a configured policy, a witness.
    """

    epoch: int
    source: str


class IWitness(Interface):
    """The arbiter: an atomic compare-and-set of (VM name, epoch, holder)."""

    def acquire(vm, epoch, holder, forced):  # type: ignore[no-untyped-def]
        """
        Ask to go on alone as the holder of generation C{epoch}.

        @param forced: bool: an operator's word, or proof that the other side's guest is dead.
        @return: a Deferred firing with a L{Grant}, or with None: hold, somebody else may be running.
        """


__all__ = [
    "CheckpointImage",
    "ColoMode",
    "Grant",
    "IActiveSecondary",
    "IDeviceState",
    "IFramePort",
    "IFrameRelay",
    "IGuestFactory",
    "ILiveState",
    "IOutputGate",
    "IPrimaryGuest",
    "IReplication",
    "IRunControl",
    "ISecondaryGuest",
    "IWitness",
    "RunState",
    "Sink",
]
