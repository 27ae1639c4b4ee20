"""/dev/xpmem: what the thread groups of one process share. On its own it reaches nobody else.

`Partition` is one that does.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mmunotify import Log

from .errors import XpmemError
from .exporter import Exporter
from .segments import pack_id
from .thread_group import ThreadGroup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mmunotify import Notifiers

    from .pfns import PfnTable, Wait
    from .remote import RemotePermit
    from .segments import Credentials


def new_id() -> bytes:
    """128 random bits."""
    return secrets.token_bytes(16)


class Xpmem:
    """The device of one process. `part` is its number, the upper half of its ids: by default the
    process's own, which no other process of the host has at the same time.
    """

    def __init__(self, part: int | None = None, *, logger: object = None, **exporting: Any) -> None:
        self.part: Final = os.getpid() if part is None else part
        if not 0 < self.part < 1 << 31:
            raise XpmemError(errno.EINVAL, f"partition {part}: expected 1 to 2**31 - 1")
        self.inc: Final = new_id()
        """This incarnation of it."""
        self.log: Final = Log(logger, xpmem=self.part)
        self.exporter: Final = Exporter(self.part, self.inc, new_id, **exporting)
        self.groups: Final[set[ThreadGroup]] = set()
        self._segids = 0

    def new_segid(self) -> int:
        """A segid that was never used before."""
        self._segids += 1
        return pack_id(self.part, self._segids)

    async def open(
        self,
        notifiers: Notifiers[Any] | None = None,
        *,
        credentials: Credentials | None = None,
        pin: bool = False,
    ) -> ThreadGroup:
        """Open the device for a process: `notifiers` are those of its address space.

        Without them it can attach, but not export. `credentials` are this process's by default.
        The driver is sleepable where the locking model lets it sleep, else deferred. Raises what
        `Notifiers.register` does.
        """
        from .driver import DeferredXpmemDriver, XpmemDriver

        group = ThreadGroup(self, credentials, pin=pin)
        if notifiers is not None:
            sleepable = notifiers.locks.sleepable
            driver = (XpmemDriver if sleepable else DeferredXpmemDriver).serving(group)
            subscription = await notifiers.register(driver)
            group.leave = partial(notifiers.unregister, subscription)
        self.groups.add(group)
        return group

    @asynccontextmanager
    async def opened(
        self,
        notifiers: Notifiers[Any] | None = None,
        *,
        credentials: Credentials | None = None,
        pin: bool = False,
    ) -> AsyncIterator[ThreadGroup]:
        """`open` on entry, `ThreadGroup.close` on exit."""
        group = await self.open(notifiers, credentials=credentials, pin=pin)
        try:
            yield group
        finally:
            await group.close()

    async def get_remote(self, segid: int, *, write: bool) -> RemotePermit:
        """A permit of another partition."""
        raise XpmemError(errno.ENOENT, f"get({segid:#x}): partition {segid >> 32} is another one")

    async def settle(self, table: PfnTable, wait: Wait) -> None:
        """Return when all that `wait` waits for has been acknowledged."""
        raise AssertionError("nobody else has pages of this process")

    def flush(self) -> None:
        """Send what is to be sent."""
