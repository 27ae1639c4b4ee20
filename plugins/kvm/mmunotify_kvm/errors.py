"""What can go wrong with a virtual machine, and the exits to its user that are no errors."""

from __future__ import annotations

import errno
import os

from mmunotify import MmuNotifyError


class KvmError(MmuNotifyError):
    """A request to the virtual machine that Linux would answer with this `errno`."""

    def __init__(self, number: int, message: str) -> None:
        self.errno = number
        super().__init__(f"{message} ({errno.errorcode[number]}: {os.strerror(number)})")


class Exit(MmuNotifyError):
    """A vCPU leaves the guest: its access is not done, and its user has something to do first."""


class MmioExit(Exit):
    """The guest used an address without memory, or wrote to a read-only slot (KVM_EXIT_MMIO)."""

    def __init__(self, address: int, size: int, data: bytes | None) -> None:
        self.address = address
        """Guest physical, in bytes."""
        self.size = size
        self.data = data
        """What was to be stored; None for a load."""
        what = "load" if data is None else "store"
        super().__init__(f"MMIO {what} of {size} bytes at guest physical {address:#x}")


class DirtyRingFull(Exit):
    """The vCPU's dirty ring has to be collected first (KVM_EXIT_DIRTY_RING_FULL)."""
