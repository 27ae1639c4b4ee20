"""A balloon: the guest gives pages back, and the host takes what is behind them.

Source: drivers/virtio/virtio_balloon.c, and what a VMM does with it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from mmunotify import PAGE_SHIFT, PAGE_SIZE

from .errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from .vm import VirtualMachine


class Balloon:
    """The balloon of one virtual machine.

    `discard(address, length)` is how the host drops its memory, in bytes: MADV_DONTNEED on its own
    address space, which announces it to the machine like any other change.
    """

    def __init__(
        self, vm: VirtualMachine, discard: Callable[[int, int], Awaitable[object]]
    ) -> None:
        self._vm: Final = vm
        self._discard: Final = discard
        self.pages: Final[set[int]] = set()
        """The gfns in the balloon: the guest does not use them until it has deflated it."""

    async def inflate(self, gfns: Iterable[int]) -> None:
        """The guest gives these pages away; their contents are gone. May suspend.

        Raises KvmError (EINVAL) for a page that is in the balloon or not in any memslot; the pages
        before it have been given.
        """
        run: list[int] = []
        for gfn in sorted(set(gfns)):
            if gfn in self.pages or self._vm.memslots.find(gfn) is None:
                await self._give(run)
                raise KvmError(errno.EINVAL, f"balloon: gfn {gfn:#x} is not the guest's to give")
            if run and self._address(gfn) != self._address(run[-1]) + PAGE_SIZE:
                await self._give(run)
                run = []
            run.append(gfn)
        await self._give(run)

    def deflate(self, count: int) -> list[int]:
        """The guest takes pages back, the lowest first; they read as zeros."""
        back = sorted(self.pages)[:count]
        self.pages.difference_update(back)
        return back

    def _address(self, gfn: int) -> int:
        slot = self._vm.memslots.find(gfn)
        assert slot is not None
        return slot.address(gfn)

    async def _give(self, run: list[int]) -> None:
        if run:
            self.pages.update(run)
            await self._discard(self._address(run[0]), len(run) << PAGE_SHIFT)
