"""What a driver offers so that recorded guests can be run in its virtual machine.

    mmunotify model check --driver NAME ...

The recordings have what a real KVM guest did to its host's memory: which page faults reached the
hypervisor, and what that mapped. A driver of this kind takes the place of the plain `Guest` here.
Page numbers are the guest's, addresses and sizes are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from mmunotify.errors import BadAddress
from mmunotify.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable


@runtime_checkable
class GuestDriver(Protocol):
    """A driver with a virtual machine of one guest, which has memory from address 0 on."""

    def record(
        self,
        fault: Callable[[int, bool], object],
        mapped: Callable[[int, bool, bool], object],
    ) -> None:
        """Before it is attached: be the recorded machine, which maps by small pages only.

        `fault(page, write)` is to be called for every page fault that the hypervisor serves, each
        time that it is repeated; `mapped(page, writable, prefetched)` for every page that it maps.
        """
        ...

    async def set_memory(self, address: int | None, size: int) -> None:
        """Let `size` bytes of guest memory be the host's from `address` on; None: there is none."""
        ...

    async def log_dirty(self, on: bool) -> None:
        """Start or stop logging which pages are written."""
        ...

    async def dirty_log(self) -> list[int] | None:
        """The pages written since the last call, ascending; None when nothing is logged."""
        ...

    async def load(self, address: int) -> int | None:
        """The guest reads a byte; None: no memory there. BadAddress if the host has no page."""
        ...

    async def store(self, address: int, value: int) -> bool:
        """The guest writes a byte; False: no memory there. BadAddress if the host has no page."""
        ...


class GuestTrace:
    """What a guest's hypervisor did, in the terms of a recording."""

    def __init__(self) -> None:
        self.faults: Final[list[list[Any]]] = []
        """[page, "r" or "w"] each (`gf`)."""
        self.mappings: Final[list[list[Any]]] = []
        """[page, "r" or "w", and "-" if it was mapped before it was used] each (`gm`)."""

    def fault(self, page: int, write: bool) -> None:
        """A page fault was served."""
        self.faults.append([page, "w" if write else "r"])

    def mapped(self, page: int, writable: bool, prefetched: bool) -> None:
        """A page was mapped."""
        self.mappings.append([page, ("w" if writable else "r") + "-" * prefetched])

    def take(self) -> tuple[list[list[Any]], list[list[Any]]]:
        """Faults and mappings since the last time."""
        taken = self.faults.copy(), self.mappings.copy()
        self.faults.clear()
        self.mappings.clear()
        return taken


async def touch(guest: GuestDriver, at: int, count: int, value: int | None) -> list[Any]:
    """Read (or write, if given a value) the first byte of each page: values, or why not."""
    seen: list[Any] = []
    for page in range(at, at + count):
        try:
            if value is None:
                found = await guest.load(page * PAGE_SIZE)
                seen.append("MMIO" if found is None else found)
            else:
                done = await guest.store(page * PAGE_SIZE, value)
                seen.append(0 if done else "MMIO")
        except BadAddress:
            seen.append("EFAULT")
    return seen
