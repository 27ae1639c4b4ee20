"""The OOM reaper: it takes the memory of a process that is to die, and must not wait for anybody.

Each VMA is a section that may not suspend; one whose drivers would have to is left for the next
round. Source: mm/oom_kill.c (__oom_reap_task_mm).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmunotify.errors import WouldBlock
from mmunotify.ranges import PAGE_SHIFT, Event, Range

from . import flags as f
from . import memory

if TYPE_CHECKING:
    from .mm import AddressSpace


def oom_reap(mm: AddressSpace[Any]) -> bool:
    """Zap the private memory of `mm`, last VMA first; True if nothing had to be skipped.

    Plain: the whole of it runs without suspending. Also False if mmap_lock is held for writing.
    """
    if not mm.mmap_lock.down_read_trylock():
        return False
    complete = True
    try:
        for vma in reversed(mm.vmas):
            if vma.flags & (f.VM_PFNMAP | f.VM_HUGETLB):
                continue
            if vma.file is not None and vma.flags & f.VM_SHARED:
                continue
            rng = Range(vma.first << PAGE_SHIFT, vma.last << PAGE_SHIFT, Event.UNMAP)
            told = None
            if mm.notifiers.armed:
                try:
                    told = mm.notifiers.invalidate_range_start_nonblock(rng)
                except WouldBlock:
                    complete = False
                    continue
            gather = memory.Gather(mm, hold=True)
            for index in [i for i in mm.pt.huge if vma.first <= i << 9 < vma.last]:
                mm.split_entry(index)
            for page, entries in mm.pt.runs(vma.first, vma.last):
                memory.zap_run(mm, vma, entries, gather, True, True)
                mm.flush_tlb(page, page + len(entries))
            failed: object = ()
            if told is not None:
                failed = mm.notifiers.invalidate_range_end_nonblock(rng, told)
            gather.finish(leak=bool(failed))
    finally:
        mm.mmap_lock.up_read()
    mm.oom_skip = complete
    return complete
