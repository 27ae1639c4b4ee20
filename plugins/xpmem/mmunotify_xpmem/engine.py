"""What carries messages between partitions: as little as possible.

An engine is a datagram service: what is sent may be lost, come twice or in any order, and whoever
says that a partition is gone may be wrong. Safety never depends on it, so anything that carries
bytes to a subject can be one. Subjects are byte strings:

    p.PART        the partition of that number, whichever incarnation there is
    p.PART.INC    that incarnation of it
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from .segments import Credentials
    from .wire import Buffer


class Sender(Protocol):
    """Where a message came from, as far as the engine can vouch for it."""

    @property
    def credentials(self) -> Credentials:
        """What permits are checked against."""
        ...

    @property
    def killable(self) -> bool:
        """Whether it is a process of this host that `kill` can end."""
        ...

    def is_same(self, other: Sender) -> bool:
        """Whether `other` may speak for the same partition, over another link perhaps."""
        ...

    async def kill(self) -> int:
        """End the process with SIGKILL and return its pid once the kernel says that it is dead."""
        ...

    async def exited(self) -> None:
        """Return once the kernel says that the process is dead, if it can; else never."""
        ...


class Events(Protocol):
    """What an engine tells its user. Plain functions: they return at once and do not raise."""

    def received(self, sender: Sender, frame: memoryview) -> None:
        """A frame for one of the subscribed subjects; `frame` is good until this returns, and
        longer where it is in what `room` has returned.

        Raises BadMessage if it is not one of the protocol's, which costs the sender its link.
        """
        ...

    def room(self, size: int) -> memoryview:
        """Memory for a frame of `size` bytes that is arriving, where an engine can make use of it.

        It is the user's own again when the frame has been `received`, or lost.
        """
        ...

    def lost(self) -> None:
        """Messages may have been lost: a hint to send again. Nobody need be dead."""
        ...

    def gone(self, sender: Sender) -> None:
        """A link to somebody is down: a hint to look whether it is dead, and no proof."""
        ...


class Answerable(Protocol):
    """A request."""

    @property
    def done(self) -> bool:
        """Whether it is answered, or never will be."""
        ...


class Engine(Protocol):
    """Carries frames. One user, one event loop."""

    async def open(self, events: Events) -> None:
        """Get ready to send and receive. Raises OSError; nothing is open then."""
        ...

    async def run(self) -> None:
        """Do what has to be done in the background until cancelled. Called once, when open."""
        ...

    async def aclose(self) -> None:
        """Close everything that is open. Does not suspend."""
        ...

    def subscribe(self, subject: bytes) -> None:
        """Have frames for `subject` given to `received`."""
        ...

    def send(self, subject: bytes, header: bytes, body: Buffer = b"") -> bool:
        """Send one frame: header and body. Never suspends; may lose it.

        `body` must not change afterwards. False is a hint that nobody listens there.
        """
        ...

    def take(self) -> None:
        """Receive what has arrived already, if the engine can: it saves a turn of the loop.

        To be called where nothing is being received, and not for ever without others running.
        """
        ...

    async def pump(self, subject: bytes, request: Answerable) -> None:
        """Receive what comes from there, in the task of who waits for it, until it is answered.

        That saves waking a task for it. It may return before, and at once where the engine cannot
        or another task does it already: the caller has to be able to wait without.
        """
        ...


@lru_cache(maxsize=4096)
def address_of(part: int, inc: bytes = b"") -> bytes:
    """The subject of a partition, or of one incarnation of it."""
    return b"p.%d.%s" % (part, inc.hex().encode()) if inc else b"p.%d" % part


PREFIX: Final = b"p."
