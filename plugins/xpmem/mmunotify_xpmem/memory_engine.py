"""An engine in memory: partitions of one process, for tests and for the interleaving explorer.

Frames arrive in order. With `manual` they wait in `MemoryHub.carried` instead, where whoever tests
may take them out, in any order, and `deliver` them, as often as it likes or never.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import anyio
import attrs

from .segments import Credentials
from .wire import BadMessage

if TYPE_CHECKING:
    from .engine import Answerable, Events, Sender
    from .wire import Buffer


@attrs.define(slots=True, eq=False)
class LocalSender:
    """A partition of this process; `kill` and `exited` are what a test says they are."""

    credentials: Credentials
    killable: bool = False
    dead: anyio.Event | None = None

    def is_same(self, other: Sender) -> bool:
        """Whether it is this one."""
        return other is self

    async def kill(self) -> int:
        """Nothing to kill; `dead` is the proof."""
        await self.exited()
        return 0

    async def exited(self) -> None:
        """Wait for `dead`, or for ever."""
        if self.dead is None:
            await anyio.sleep_forever()
        else:
            await self.dead.wait()


@attrs.define(slots=True, eq=False)
class Carried:
    """One frame on its way."""

    sender: LocalSender
    receiver: MemoryEngine
    frame: bytes


class MemoryHub:
    """What connects memory engines. Nothing of it suspends."""

    def __init__(self, *, manual: bool = False) -> None:
        self.manual: Final = manual
        self.carried: Final[deque[Carried]] = deque()
        """On their way, oldest first."""
        self.refused = 0
        """Frames that their receiver has called malformed."""
        self._listeners: Final[dict[bytes, MemoryEngine]] = {}

    def engine(
        self, credentials: Credentials | None = None, *, killable: bool = False
    ) -> MemoryEngine:
        """An engine for one more partition."""
        return MemoryEngine(self, LocalSender(credentials or Credentials.mine(), killable))

    def deliver(self, carried: Carried) -> None:
        """Let a frame arrive, whether it is still on its way or not."""
        events = carried.receiver.events
        if events is not None:
            try:
                events.received(carried.sender, memoryview(carried.frame))
            except BadMessage:
                self.refused += 1


class MemoryEngine:
    """One partition's end of a hub."""

    def __init__(self, hub: MemoryHub, sender: LocalSender) -> None:
        self.hub: Final = hub
        self.sender: Final = sender
        self.events: Events | None = None
        self._subjects: list[bytes] = []
        self._inbox: deque[Carried] = deque()
        self._arrived: anyio.Event | None = None

    async def open(self, events: Events) -> None:
        """Get ready to send and receive."""
        self.events = events
        for subject in self._subjects:
            self.hub._listeners[subject] = self

    async def run(self) -> None:
        """Carry what is for this partition, until cancelled."""
        while True:
            while self._inbox:
                self.hub.deliver(self._inbox.popleft())
            self._arrived = anyio.Event()
            await self._arrived.wait()

    async def aclose(self) -> None:
        """Neither send nor receive any more."""
        self.events = None
        for subject in self._subjects:
            if self.hub._listeners.get(subject) is self:
                del self.hub._listeners[subject]

    def subscribe(self, subject: bytes) -> None:
        """Have frames for `subject` given to `received`."""
        self._subjects.append(subject)
        if self.events is not None:
            self.hub._listeners[subject] = self

    def send(self, subject: bytes, header: bytes, body: Buffer = b"") -> bool:
        """Put a frame on its way."""
        receiver = self.hub._listeners.get(subject)
        if receiver is None:
            return False
        carried = Carried(self.sender, receiver, header + body)
        if self.hub.manual:
            self.hub.carried.append(carried)
        else:
            receiver._arrive(carried)
        return True

    def take(self) -> None:
        """What arrives is carried by `run`."""

    async def pump(self, subject: bytes, request: Answerable) -> None:
        """What arrives is carried by `run`, for all."""

    def _arrive(self, carried: Carried) -> None:
        self._inbox.append(carried)
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None
