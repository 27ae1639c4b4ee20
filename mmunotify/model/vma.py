"""vm_area: one mapping, the sorted list of them, split and merge.

Everything here counts in pages; `start` and `end` give bytes to the outside. Splitting a VMA inside
a 2 MiB range announces that range, huge page or not, once the GiB has a PMD table.

Source: mm/vma.c.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from mmunotify.errors import MmError
from mmunotify.locks.base import READY, Awaited
from mmunotify.ranges import PAGE_SHIFT

from . import flags as f
from .rmap import WriteLocked, locks_of

if TYPE_CHECKING:
    from .filemap import File
    from .mm import AddressSpace
    from .rmap import AnonVma
    from .userfaultfd import UserFaultFd

# Ignored when two neighbours are compared; the merged VMA has it if either had it.
_STICKY = f.VM_MAYBE_GUARD


class Vma:
    """One mapping: pages [first, last) with one set of flags, of one file or none.

    `pgoff` is the file offset of its first page or, for anonymous memory, the page number at which
    it was first mapped. `chain` links it to every anon_vma that may own its pages.
    """

    __slots__ = (
        "anon_vma",
        "chain",
        "file",
        "first",
        "flags",
        "last",
        "lock_seq",
        "mm",
        "pgoff",
        "prot",
        "swap_ra",
        "uffd",
    )

    def __init__(
        self,
        mm: AddressSpace[Any],
        first: int,
        last: int,
        flags: int,
        pgoff: int,
        file: File | None,
    ) -> None:
        self.mm = mm
        self.first = first
        self.last = last
        self.flags = flags
        self.pgoff = pgoff
        self.file = file
        self.anon_vma: AnonVma | None = None
        self.chain: list[AnonVma] = []
        self.uffd: UserFaultFd | None = None
        self.swap_ra = (0, 0, 4)
        """Swap readahead: page of the last fault, its window, hits since."""
        self.lock_seq = -1
        """Equal to the mm's `lock_seq` while a writer holds this VMA (vma_start_write)."""
        self.prot = 0
        self.set_page_prot()

    def __repr__(self) -> str:
        return f"<Vma [{self.start:#x}, {self.end:#x}) {self.perms}>"

    @property
    def start(self) -> int:
        """First byte."""
        return self.first << PAGE_SHIFT

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.last << PAGE_SHIFT

    @property
    def pages(self) -> int:
        """Size in pages."""
        return self.last - self.first

    @property
    def perms(self) -> str:
        """As in /proc/pid/maps: "rw-p"."""
        flags = self.flags
        return (
            ("r" if flags & f.VM_READ else "-")
            + ("w" if flags & f.VM_WRITE else "-")
            + ("x" if flags & f.VM_EXEC else "-")
            + ("s" if flags & f.VM_MAYSHARE else "p")
        )

    @property
    def mnemonics(self) -> tuple[str, ...]:
        """What smaps prints on its VmFlags line, permissions left out."""
        return tuple(name for flag, name in f.MNEMONICS if self.flags & flag)

    @property
    def anonymous(self) -> bool:
        """Whether no file stands behind it (vma_is_anonymous)."""
        return self.file is None

    @property
    def cow(self) -> bool:
        """Whether its pages are copied on write (is_cow_mapping)."""
        return self.flags & (f.VM_SHARED | f.VM_MAYWRITE) == f.VM_MAYWRITE

    def set_page_prot(self) -> None:
        """Derive the bits of a fresh entry from the flags (vma_set_page_prot).

        Writable ones only where a write need not be noticed: shared memory without writeback.
        """
        flags = self.flags
        prot = f.PTE_PRESENT | f.PTE_ACCESSED
        if flags & f.VM_ACCESS_FLAGS:
            prot |= f.PTE_USER
        if not flags & f.VM_EXEC:
            prot |= f.PTE_NX
        if (
            flags & f.VM_WRITE
            and flags & f.VM_SHARED
            and not (self.file is not None and self.file.writenotify)
            and not flags & f.VM_UFFD_WP
        ):
            prot |= f.PTE_RW
        self.prot = prot

    def dup(self) -> Vma:
        """A copy that nobody finds yet: without anon_vmas, in no tree."""
        vma = Vma.__new__(Vma)
        vma.mm = self.mm
        vma.first = self.first
        vma.last = self.last
        vma.flags = self.flags
        vma.pgoff = self.pgoff
        vma.file = self.file
        vma.anon_vma = None
        vma.chain = []
        vma.uffd = self.uffd
        vma.swap_ra = self.swap_ra
        vma.lock_seq = -1
        vma.prot = self.prot
        return vma

    def set_range(self, first: int, last: int, pgoff: int) -> None:
        """Move its bounds, in the reverse maps too; their locks are held for writing."""
        for anon_vma in self.chain:
            anon_vma.tree.remove(self)
        if self.file is not None:
            self.file.i_mmap.remove(self)
        self.first = first
        self.last = last
        self.pgoff = pgoff
        for anon_vma in self.chain:
            anon_vma.tree.insert(self)
        if self.file is not None:
            self.file.i_mmap.insert(self)


def find_vma(mm: AddressSpace[Any], page: int) -> Vma | None:
    """The VMA that maps a page (vma_lookup)."""
    at = bisect_right(mm.firsts, page) - 1
    if at >= 0:
        vma = mm.vmas[at]
        if page < vma.last:
            return vma
    return None


def index_after(mm: AddressSpace[Any], page: int) -> int:
    """The index in `mm.vmas` of the first VMA that ends above a page (find_vma)."""
    at = bisect_right(mm.firsts, page)
    if at and mm.vmas[at - 1].last > page:
        return at - 1
    return at


def vmas_in(mm: AddressSpace[Any], first: int, last: int) -> list[Vma]:
    """The VMAs that meet pages [first, last), ascending; a snapshot."""
    low = index_after(mm, first)
    high = bisect_right(mm.firsts, last - 1)
    return mm.vmas[low:high]


def link(mm: AddressSpace[Any], vma: Vma) -> None:
    """Put a VMA into the sorted list."""
    at = bisect_right(mm.firsts, vma.first)
    mm.firsts.insert(at, vma.first)
    mm.vmas.insert(at, vma)


def unlink(mm: AddressSpace[Any], vma: Vma) -> None:
    """Take a VMA out of the sorted list."""
    at = bisect_right(mm.firsts, vma.first) - 1
    del mm.firsts[at], mm.vmas[at]


def _moved(mm: AddressSpace[Any], vma: Vma, was: int) -> None:
    """The VMA's first page changed: correct the sorted list, in which its place is the same."""
    if vma.first != was:
        mm.firsts[bisect_right(mm.firsts, was) - 1] = vma.first


# ---------------------------------------------------------------------- huge ranges


def _in_huge_range(vma: Vma, page: int) -> bool:
    """Whether a VMA has all of the 2 MiB that a page is inside of, and a table above them."""
    first = page & ~511
    return (
        first != page
        and first >= vma.first
        and first + 512 <= vma.last
        and vma.mm.pt.has_pmd(page)
        # 2008 has no huge pages to split, so it announces none.
        and (vma.mm.machine.era != "v16" or page >> 9 in vma.mm.pt.huge)
    )


def _adjust_trans_huge(vma: Vma, first: int, last: int, nxt: Vma | None) -> Awaited:
    """Split what is huge where a VMA will begin and end, and the next one begin."""
    edges = [
        (each, page)
        for each, page in ((vma, first), (vma, last), (nxt, last))
        if each is not None and page & 511 and _in_huge_range(each, page)
    ]
    return _split_edges(edges) if edges else READY


async def _split_edges(edges: list[tuple[Vma, int]]) -> None:
    for vma, page in edges:
        if _in_huge_range(vma, page):
            await vma.mm.split_huge_pmd(page & ~511, vma, locked=True)


# ---------------------------------------------------------------------- split


async def split(mm: AddressSpace[Any], vma: Vma, page: int, *, new_below: bool) -> Vma:
    """Cut a VMA at a page; returns the new one, which is below or above it (__split_vma).

    mmap_lock is held for writing. May suspend; announces the enclosing 2 MiB. EINVAL in the middle
    of a hugetlb page.
    """
    if vma.flags & f.VM_HUGETLB and page & 511:
        raise MmError(errno.EINVAL, f"{vma!r} cannot be cut at {page << PAGE_SHIFT:#x}: hugetlb")
    new = vma.dup()
    mm.vma_start_write(vma)
    mm.vma_start_write(new)
    async with WriteLocked(locks_of((vma,))):
        await _adjust_trans_huge(vma, vma.first, page, None)
        was = vma.first
        if new_below:
            new.last = page
            vma.set_range(page, vma.last, vma.pgoff + page - was)
        else:
            new.first = page
            new.pgoff += page - was
            vma.set_range(was, page, vma.pgoff)
        new.anon_vma = vma.anon_vma
        mm.machine.anon_vmas.clone(new, vma)
        if new.file is not None:
            new.file.i_mmap.insert(new)
            new.file.get()
        _moved(mm, vma, was)
        link(mm, new)
    await mm.machine.settle()
    return new


# ---------------------------------------------------------------------- merge


def _same(vma: Vma, flags: int, file: File | None, uffd: UserFaultFd | None) -> bool:
    return (
        not (vma.flags ^ flags) & ~_STICKY
        and vma.file is file
        and vma.uffd is uffd
        and not flags & f.VM_SPECIAL
    )


def _had_uncowed_parents(vma: Vma | None) -> bool:
    return vma is not None and vma.anon_vma is not None and len(vma.chain) != 1


def _anon_mergeable(
    target: Vma, anon_vma: AnonVma | None, middle: Vma | None, copied: Vma | None
) -> bool:
    if target.anon_vma is None and anon_vma is not None:
        return not _had_uncowed_parents(middle) and not _had_uncowed_parents(copied)
    if target.anon_vma is not None and anon_vma is None:
        return not _had_uncowed_parents(target)
    return anon_vma is target.anon_vma


def _neighbours_compatible(prev: Vma, nxt: Vma) -> bool:
    return prev.anon_vma is None or nxt.anon_vma is None or prev.anon_vma is nxt.anon_vma


async def merge_new(
    mm: AddressSpace[Any],
    first: int,
    last: int,
    flags: int,
    pgoff: int,
    file: File | None,
    *,
    anon_vma: AnonVma | None = None,
    uffd: UserFaultFd | None = None,
    copied: Vma | None = None,
    just_expand: bool = False,
) -> Vma | None:
    """Extend a neighbour over the hole [first, last) if it is alike; the VMA, or None.

    Source: vma_merge_new_range.
    """
    at = bisect_right(mm.firsts, first)
    prev = mm.vmas[at - 1] if at else None
    nxt = mm.vmas[at] if at < len(mm.vmas) else None
    left = (
        prev is not None
        and prev.last == first
        and _same(prev, flags, file, uffd)
        and _anon_mergeable(prev, anon_vma, None, copied)
        and prev.pgoff + prev.pages == pgoff
    )
    right = (
        not just_expand
        and nxt is not None
        and nxt.first == last
        and _same(nxt, flags, file, uffd)
        and _anon_mergeable(nxt, anon_vma, None, copied)
        and pgoff + last - first == nxt.pgoff
        and not (left and not _neighbours_compatible(prev, nxt))  # type: ignore[arg-type]
    )
    if left:
        assert prev is not None
        gone = nxt if right else None
        return await _commit(
            mm, prev, prev.first, gone.last if gone else last, prev.pgoff,
            gone=(gone,), donor=copied, flags=flags,
        )  # fmt: skip
    if right:
        assert nxt is not None
        return await _commit(mm, nxt, first, nxt.last, pgoff, donor=copied, flags=flags)
    return None


async def _merge_existing(
    mm: AddressSpace[Any], vma: Vma, first: int, last: int, flags: int, uffd: UserFaultFd | None
) -> Vma | None:
    """Give [first, last) of a VMA to a neighbour that has `flags` already."""
    left_side, right_side = first == vma.first, last == vma.last
    if flags & f.VM_SPECIAL or not (left_side or right_side):
        return None
    at = bisect_right(mm.firsts, vma.first) - 1
    prev = mm.vmas[at - 1] if at else None
    nxt = mm.vmas[at + 1] if at + 1 < len(mm.vmas) else None
    pgoff = vma.pgoff + first - vma.first
    left = (
        left_side
        and prev is not None
        and prev.last == first
        and _same(prev, flags, vma.file, uffd)
        and _anon_mergeable(prev, vma.anon_vma, vma, None)
        and prev.pgoff + prev.pages == pgoff
    )
    right = (
        right_side
        and nxt is not None
        and nxt.first == last
        and _same(nxt, flags, vma.file, uffd)
        and _anon_mergeable(nxt, vma.anon_vma, vma, None)
        and pgoff + last - first == nxt.pgoff
        and not (left and not _neighbours_compatible(prev, nxt))  # type: ignore[arg-type]
    )
    if left and right:
        assert prev is not None
        assert nxt is not None
        donor = nxt if nxt.anon_vma is not None else vma
        return await _commit(
            mm, prev, prev.first, nxt.last, prev.pgoff, gone=(vma, nxt), donor=donor, flags=flags
        )
    if left:
        assert prev is not None
        if right_side:
            return await _commit(
                mm, prev, prev.first, last, prev.pgoff, gone=(vma,), donor=vma, flags=flags
            )
        return await _commit(
            mm, prev, prev.first, last, prev.pgoff, shrink=vma, donor=vma, flags=flags
        )
    if right:
        assert nxt is not None
        if left_side:
            return await _commit(
                mm, nxt, first, nxt.last, pgoff, gone=(vma,), donor=vma, flags=flags
            )
        return await _commit(mm, nxt, first, nxt.last, pgoff, shrink=vma, donor=vma, flags=flags)
    return None


async def _commit(
    mm: AddressSpace[Any],
    target: Vma,
    first: int,
    last: int,
    pgoff: int,
    *,
    gone: tuple[Vma | None, ...] = (),
    shrink: Vma | None = None,
    donor: Vma | None = None,
    flags: int = 0,
) -> Vma:
    """Let `target` cover [first, last); `gone` disappear into it, `shrink` loses what it gains."""
    leaving = [vma for vma in gone if vma is not None]
    for vma in (target, shrink, *leaving):
        if vma is not None:
            mm.vma_start_write(vma)
    async with WriteLocked(locks_of((target, shrink, donor, *leaving))):
        anon_vmas = mm.machine.anon_vmas
        for vma in (*leaving, donor):
            if vma is not None:
                anon_vmas.dup(target, vma)
        if shrink is not None and first < target.first:
            await _adjust_trans_huge(shrink, shrink.first, first, None)
        else:
            await _adjust_trans_huge(target, first, last, shrink)
        for vma in leaving:
            unlink(mm, vma)
        was = target.first
        if shrink is not None:
            if first < was:
                shrink.set_range(shrink.first, first, shrink.pgoff)
            else:
                before = shrink.first
                shrink.set_range(last, shrink.last, shrink.pgoff + last - before)
                _moved(mm, shrink, before)
        target.set_range(first, last, pgoff)
        _moved(mm, target, was)
        target.flags |= flags & _STICKY
        for vma in leaving:
            target.flags |= vma.flags & _STICKY
            anon_vmas.unlink(vma)
            if vma.file is not None:
                vma.file.i_mmap.remove(vma)
                vma.file.put()
    await mm.machine.settle()
    return target


async def modify(
    mm: AddressSpace[Any],
    vma: Vma,
    first: int,
    last: int,
    flags: int,
    *,
    uffd: UserFaultFd | None = None,
    keep_uffd: bool = True,
) -> Vma:
    """Give exactly [first, last) of a VMA new flags: merge with a neighbour, or split it off.

    Returns the VMA that holds the range now, which has the new flags only if it was merged.
    Source: vma_modify.
    """
    if keep_uffd:
        uffd = vma.uffd
    merged = await _merge_existing(mm, vma, first, last, flags, uffd)
    if merged is not None:
        return merged
    if vma.first < first:
        await split(mm, vma, first, new_below=True)
    if vma.last > last:
        await split(mm, vma, last, new_below=False)
    return vma
