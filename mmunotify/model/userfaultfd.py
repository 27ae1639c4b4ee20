"""userfaultfd as operations of an address space: missing pages, minor faults, write protection.

A fault in a registered range waits, without mmap_lock, until somebody copies, zeroes, maps or
unprotects its page or unregisters the range. Only write protection and moves are announced: a page
that appears is nothing that a driver could hold.

Source: mm/userfaultfd.c, fs/userfaultfd.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, Event

from . import flags as f
from . import frames as fr
from .fault import map_file_page
from .mmap import pages_of
from .mprotect import change_protection
from .vma import Vma, find_vma, modify, vmas_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from .mm import AddressSpace

FEATURE_WP_ASYNC: Final = 1 << 15
_MODES: Final = {
    "missing": f.VM_UFFD_MISSING,
    "wp": f.VM_UFFD_WP,
    "minor": f.VM_UFFD_MINOR,
}


async def open_uffd(mm: AddressSpace[Any], features: int = 0) -> UserFaultFd:
    """A userfaultfd of this address space, with UFFD_FEATURE_ bits."""
    mm.require_alive()
    return UserFaultFd(mm, features)


class UserFaultFd:
    """One userfaultfd. Addresses and sizes are bytes; operations may suspend."""

    def __init__(self, mm: AddressSpace[Any], features: int) -> None:
        self.mm: Final = mm
        self.features: Final = features
        self.on_event: Callable[[int, int], None] | None = None
        """Called with (address, FAULT_ flags) when a fault begins to wait."""
        self._waiting: dict[int, anyio.Event] = {}

    @property
    def async_wp(self) -> bool:
        """Whether a write to a protected page unprotects it and goes on."""
        return bool(self.features & FEATURE_WP_ASYNC)

    async def handle(self, mm: AddressSpace[Any], page: int, flags: int) -> None:
        """A fault waits until it is worth trying again; drops mmap_lock meanwhile."""
        event = self._waiting.get(page)
        if event is None:
            event = self._waiting[page] = anyio.Event()
        if self.on_event is not None:
            self.on_event(page << PAGE_SHIFT, flags)
        mm.mmap_lock.up_read()
        try:
            await event.wait()
        finally:
            with anyio.CancelScope(shield=True):
                await mm.mmap_lock.down_read()

    def wake(self, first: int, last: int) -> None:
        """Let the faults that wait on pages [first, last) try again."""
        for page in [p for p in self._waiting if first <= p < last]:
            self._waiting.pop(page).set()

    def _range(self, what: str, addr: int, length: int) -> tuple[int, int]:
        self.mm.require_alive()
        first, last = pages_of(self.mm, addr, length, f"uffd {what}")
        if first == last or length & (PAGE_SIZE - 1):
            raise MmError(errno.EINVAL, f"uffd {what}({addr:#x}, {length:#x}): whole pages only")
        return first, last

    async def register(
        self, addr: int, length: int, mode: Literal["missing", "wp", "minor"] = "missing"
    ) -> None:
        """Watch a range, which must be mapped; EBUSY if another userfaultfd watches part of it.

        "minor" is for files in memory: a fault on a page that the file has, but nobody has mapped
        here, waits for `continue_`.
        """
        first, last = self._range("register", addr, length)
        async with self.mm.write_locked:
            vmas = vmas_in(self.mm, first, last)
            if not vmas:
                raise MmError(errno.EINVAL, f"uffd register({addr:#x}): nothing is mapped")
            for vma in vmas:
                if vma.uffd not in (None, self):
                    raise MmError(errno.EBUSY, f"uffd register({addr:#x}): {vma!r} is watched")
                if _of_disk(vma) and not (mode == "wp" and self.async_wp):
                    raise MmError(errno.EINVAL, f"uffd register({addr:#x}): not for {vma!r}")
                if mode == "minor" and (vma.file is None or vma.flags & f.VM_HUGETLB):
                    raise MmError(
                        errno.EINVAL, f"uffd register({addr:#x}): minor is for files, not {vma!r}"
                    )
            for vma in vmas:
                low, high = max(first, vma.first), min(last, vma.last)
                flags = vma.flags | _MODES[mode]
                merged = await modify(self.mm, vma, low, high, flags, uffd=self, keep_uffd=False)
                self.mm.vma_start_write(merged)
                merged.flags = flags | merged.flags & f.VM_MAYBE_GUARD
                merged.uffd = self
                merged.set_page_prot()

    async def unregister(self, addr: int, length: int) -> None:
        """Stop watching a range; its write protection is removed, in one section."""
        first, last = self._range("unregister", addr, length)
        async with self.mm.write_locked:
            vmas = vmas_in(self.mm, first, last)
            if not vmas:
                raise MmError(errno.EINVAL, f"uffd unregister({addr:#x}): nothing is mapped")
            for vma in vmas:
                if vma.uffd is None and _of_disk(vma):
                    raise MmError(errno.EINVAL, f"uffd unregister({addr:#x}): not for {vma!r}")
            for vma in vmas:
                if vma.uffd is None:
                    continue
                low, high = max(first, vma.first), min(last, vma.last)
                if vma.flags & f.VM_UFFD_WP:
                    await change_protection(self.mm, vma, low, high, uffd_wp=False)
                flags = vma.flags & ~f.VM_UFFD
                merged = await modify(self.mm, vma, low, high, flags, uffd=None, keep_uffd=False)
                self.mm.vma_start_write(merged)
                merged.flags = flags | merged.flags & f.VM_MAYBE_GUARD
                merged.uffd = None
                merged.set_page_prot()
        self.wake(first, last)

    async def copy(self, dst: int, data: bytes) -> None:
        """Fill missing pages with bytes, a whole number of pages; EEXIST if one is there."""
        first, last = self._range("copy", dst, len(data))
        machine = self.mm.machine
        async with self.mm.mmap_lock.reading():
            for page in range(first, last):
                vma = await self._destination(page)
                frame = await machine.alloc_frame()
                if self.mm.pt.get(page):
                    machine.frames.give_back(frame)
                    raise MmError(errno.EEXIST, f"uffd copy: {page << PAGE_SHIFT:#x} is there")
                if machine.frames.data is not None:
                    low = (page - first) << PAGE_SHIFT
                    machine.frames.data[frame] = bytearray(data[low : low + PAGE_SIZE])
                leaf = self.mm.pt.leaf_of(page)
                self.mm.add_new_anon(vma, page, frame)
                writable = f.PTE_RW if vma.flags & f.VM_WRITE else 0
                leaf.pte[page & 511] = frame << PAGE_SHIFT | vma.prot | f.PTE_DIRTY | writable
                leaf.pte[page & 511] &= ~f.PTE_ACCESSED
        self.wake(first, last)

    async def zeropage(self, addr: int, length: int) -> None:
        """Map the zero page where pages are missing; EEXIST if one is there."""
        first, last = self._range("zeropage", addr, length)
        async with self.mm.mmap_lock.reading():
            for page in range(first, last):
                vma = await self._destination(page)
                if self.mm.pt.get(page):
                    raise MmError(errno.EEXIST, f"uffd zeropage: {page << PAGE_SHIFT:#x} is there")
                leaf = self.mm.pt.leaf_of(page)
                leaf.pte[page & 511] = self.mm.machine.zero_entry | vma.prot
        self.wake(first, last)

    def minor(self, vma: Vma, page: int) -> bool:
        """Whether a fault on a page that is not mapped waits because its file has it."""
        if not vma.flags & f.VM_UFFD_MINOR or vma.file is None:
            return False
        index = page - vma.first + vma.pgoff
        return index in vma.file.pages or index in vma.file.swapped

    async def continue_(self, addr: int, length: int) -> None:
        """Map what a file has where it is not mapped (UFFDIO_CONTINUE).

        ENOENT outside of mappings that are registered for minor faults, EEXIST for a page that is
        mapped, EFAULT for one that the file does not have.
        """
        first, last = self._range("continue", addr, length)
        async with self.mm.mmap_lock.reading():
            for page in range(first, last):
                await self._map(page)
        self.wake(first, last)

    async def _map(self, page: int) -> None:
        mm, where = self.mm, f"{page << PAGE_SHIFT:#x}"
        vma = find_vma(mm, page)
        if vma is None or vma.uffd is not self or not vma.flags & f.VM_UFFD_MINOR:
            raise MmError(errno.ENOENT, f"uffd continue: {where} is not registered for minor")
        if not self.minor(vma, page):
            raise MmError(errno.EFAULT, f"uffd continue: the file has no page for {where}")
        assert vma.file is not None
        frame, _ = await vma.file.page(page - vma.first + vma.pgoff)
        if mm.pt.get(page):
            raise MmError(errno.EEXIST, f"uffd continue: {where} is there")
        writable = f.PTE_RW if vma.flags & f.VM_SHARED and vma.flags & f.VM_WRITE else 0
        prot = (vma.prot | f.PTE_DIRTY | writable) & ~f.PTE_ACCESSED
        map_file_page(mm, vma, mm.pt.leaf_of(page).pte, page, frame, prot)

    async def _destination(self, page: int) -> Vma:
        vma = find_vma(self.mm, page)
        if vma is None or vma.uffd is not self or vma.file is not None:
            raise MmError(
                errno.ENOENT,
                f"uffd: {page << PAGE_SHIFT:#x} is in no anonymous mapping registered here",
            )
        await self.mm.anon_vma_prepare(vma)
        return vma

    async def writeprotect(self, addr: int, length: int, on: bool) -> None:
        """Protect a range against writes, or let them through; one announcement."""
        first, last = self._range("writeprotect", addr, length)
        async with self.mm.mmap_lock.reading():
            vmas = vmas_in(self.mm, first, last)
            if not vmas or any(not vma.flags & f.VM_UFFD_WP for vma in vmas):
                raise MmError(errno.ENOENT, f"uffd writeprotect({addr:#x}): not registered for wp")
            for vma in vmas:
                low, high = max(first, vma.first), min(last, vma.last)
                await change_protection(self.mm, vma, low, high, uffd_wp=on)
        if not on:
            self.wake(first, last)

    async def move(self, dst: int, src: int, length: int) -> None:
        """Move exclusive anonymous pages to where they are missing; the source is announced.

        EBUSY for a page that is shared or pinned, EEXIST where the destination has one, ENOENT for
        a hole in the source.
        """
        first, last = self._range("move", src, length)
        target, _ = self._range("move", dst, length)
        mm = self.mm
        async with mm.mmap_lock.reading():
            source = find_vma(mm, first)
            vma = await self._destination(target)
            if source is None or source.last < last or vma.last < target + last - first:
                raise MmError(errno.EINVAL, f"uffd move({dst:#x}, {src:#x}): not one mapping each")
            for index in {page >> 9 for page in range(first, last)} & set(mm.pt.huge):
                await mm.split_huge_pmd(index << 9, source)
            async with mm.section(first, last, Event.CLEAR), mm.locks_of(source, vma):
                for page in range(first, last):
                    self._move_page(source, vma, page, target + page - first)
                mm.flush_tlb(first, last)
        self.wake(target, target + last - first)

    def _move_page(self, source: Vma, vma: Vma, page: int, there: int) -> None:
        mm, frames = self.mm, self.mm.machine.frames
        entry = mm.pt.get(page)
        if not entry:
            raise MmError(errno.ENOENT, f"uffd move: nothing at {page << PAGE_SHIFT:#x}")
        if mm.pt.get(there):
            raise MmError(errno.EEXIST, f"uffd move: {there << PAGE_SHIFT:#x} is there")
        writable = f.PTE_RW if vma.flags & f.VM_WRITE else 0
        if entry & f.PTE_PRESENT and not entry & f.PTE_SPECIAL:
            frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
            word = frames.word[frame]
            if not word & fr.PG_EXCLUSIVE or word & fr.PG_PINNED:
                raise MmError(errno.EBUSY, f"uffd move: {page << PAGE_SHIFT:#x} is shared")
            assert vma.anon_vma is not None
            frames.set_owner(frame, vma.anon_vma.number, there - vma.first + vma.pgoff)
            moved = frame << PAGE_SHIFT | vma.prot | f.PTE_DIRTY | writable
        elif entry & f.PTE_PRESENT:
            moved = mm.machine.zero_entry | vma.prot
        else:
            moved = entry
        mm.set_pte(page, 0)
        mm.pt.leaf_of(there).pte[there & 511] = moved


def _of_disk(vma: Vma) -> bool:
    """Whether a mapping is of a file whose missing pages only its file system can supply."""
    return vma.file is not None and vma.file.writenotify
