"""A gfn-to-pfn cache: one page that the hypervisor itself uses for long, such as a guest's clock.

It is taken away by an invalidation before mmu_lock is held, and before `invalidate_in_progress`
says anything; so a refresh asks `active` instead, which is above 0 from the first moment of a
section. Source: virt/kvm/pfncache.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import attrs
from anyio.lowlevel import checkpoint

from mmunotify import PAGE_SHIFT, PAGE_SIZE, RWSemaphore

from .errors import KvmError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from mmunotify import Translation

    from .vm import VirtualMachine


class GfnToPfnCache:
    """A page at guest physical `address`; a context manager, inside of which it is kept up.

    `check` before each use, with nothing that suspends in between; `refresh` where it says no.
    """

    def __init__(self, vm: VirtualMachine, address: int) -> None:
        if address % PAGE_SIZE:
            raise KvmError(errno.EINVAL, f"pfn cache at {address:#x}: not the start of a page")
        self.vm: Final = vm
        self.gfn: Final = address >> PAGE_SHIFT
        self.valid = False
        self._refreshing: Final = RWSemaphore("pfn_cache refresh_lock")
        self._found: Translation | None = None
        self._generation = -1
        self._hva = -1

    def __enter__(self) -> Self:
        self.vm.pfn_caches.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.vm.pfn_caches.remove(self)
        self.valid = False
        self._found = None

    def check(self) -> bool:
        """Whether the page can be used now (kvm_gpc_check)."""
        return self.valid and self._generation == self.vm.memslots.generation

    def invalidate(self, start: int, end: int) -> None:
        """An invalidation of [start, end) in bytes: the page must not be used any more."""
        if self.valid and start < self._hva + PAGE_SIZE and self._hva < end:
            self.valid = False
            self.vm.counters["pfn_invalidations"] += 1

    async def refresh(self) -> None:
        """Look the page up until nothing has overtaken it; one task at a time; may suspend.

        Raises KvmError (EFAULT) where there is no memslot, BadAddress where there is no page.
        """
        vm = self.vm
        async with self._refreshing.writing():
            if self.check():
                return
            index = vm.srcu.read_lock()
            try:
                await self._refresh()
            finally:
                vm.srcu.read_unlock(index)

    async def _refresh(self) -> None:
        vm = self.vm
        self._generation = vm.memslots.generation
        slot = vm.memslots.find(self.gfn)
        if slot is None:
            raise KvmError(errno.EFAULT, f"pfn cache of gfn {self.gfn:#x}: no memslot there")
        # From here on `check` says no, whatever page it had.
        self.valid = False
        self._hva = slot.address(self.gfn)
        while True:
            seq = vm.mmu.invalidate_seq
            found = await vm.lookup(self._hva, True)
            if not self.overtaken(seq):
                break
            if vm.active:
                await checkpoint()
        self._found = attrs.evolve(found)
        self.valid = True
        vm.counters["pfn_refreshes"] += 1
        vm.note_used(slot, self.gfn, found)

    def overtaken(self, seq: int) -> bool:
        """Whether what was looked up since `seq` may be wrong (mmu_notifier_retry_cache)."""
        return self.vm.active > 0 or self.vm.mmu.invalidate_seq != seq

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the page; after a `check` that said yes. Never suspends."""
        return self.vm.read(self._usable(), self._at(offset), size)

    def write(self, offset: int, data: bytes) -> None:
        """Store into the page; after a `check` that said yes. Never suspends."""
        self.vm.write(self._usable(), self._at(offset), data)
        slot = self.vm.memslots.find(self.gfn)
        assert slot is not None
        self.vm.mark_page_dirty(None, slot, self.gfn - slot.base)

    def _usable(self) -> Translation:
        if not self.valid or self._found is None:
            raise KvmError(errno.EFAULT, f"pfn cache of gfn {self.gfn:#x}: check it before use")
        return self._found

    def _at(self, offset: int) -> int:
        return self._hva - self._usable().address + offset
