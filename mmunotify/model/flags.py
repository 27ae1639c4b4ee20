"""The names of the uapi: protections, mapping flags, vm_flags, page table bits, fault flags.

Plain integers, because they are tested on every page. Sources: include/uapi/linux/mman.h,
include/linux/mm.h, arch/x86/include/asm/pgtable_types.h.
"""

from __future__ import annotations

from typing import Final

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x0100
MAP_LOCKED: Final = 0x2000
MAP_NORESERVE: Final = 0x4000
MAP_POPULATE: Final = 0x8000
MAP_HUGETLB: Final = 0x40000
MAP_FIXED_NOREPLACE: Final = 0x100000

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4

VM_READ: Final = 0x1
VM_WRITE: Final = 0x2
VM_EXEC: Final = 0x4
VM_SHARED: Final = 0x8
VM_MAYREAD: Final = 0x10
VM_MAYWRITE: Final = 0x20
VM_MAYEXEC: Final = 0x40
VM_MAYSHARE: Final = 0x80
VM_GROWSDOWN: Final = 0x100
VM_UFFD_MISSING: Final = 0x200
VM_PFNMAP: Final = 0x400
VM_UFFD_WP: Final = 0x1000
VM_LOCKED: Final = 0x2000
VM_SEQ_READ: Final = 0x8000
VM_RAND_READ: Final = 0x10000
VM_DONTCOPY: Final = 0x20000
VM_DONTEXPAND: Final = 0x40000
VM_LOCKONFAULT: Final = 0x80000
VM_ACCOUNT: Final = 0x100000
"""Its pages count against the commit limit: it is, or was, private and writable."""
VM_NORESERVE: Final = 0x200000
VM_HUGETLB: Final = 0x400000
VM_WIPEONFORK: Final = 0x2000000
VM_DONTDUMP: Final = 0x4000000
VM_HUGEPAGE: Final = 0x20000000
VM_NOHUGEPAGE: Final = 0x40000000
VM_MERGEABLE: Final = 0x80000000
VM_MAYBE_GUARD: Final = 0x800
VM_UFFD_MINOR: Final = 1 << 41
VM_SEALED: Final = 1 << 42
VM_UFFD: Final = VM_UFFD_MISSING | VM_UFFD_WP | VM_UFFD_MINOR

VM_ACCESS_FLAGS: Final = VM_READ | VM_WRITE | VM_EXEC
VM_SPECIAL: Final = VM_PFNMAP | VM_DONTEXPAND
VM_LOCKED_MASK: Final = VM_LOCKED | VM_LOCKONFAULT

MNEMONICS: Final[tuple[tuple[int, str], ...]] = (
    (VM_GROWSDOWN, "gd"),
    (VM_UFFD_MISSING, "um"),
    (VM_PFNMAP, "pf"),
    (VM_MAYBE_GUARD, "gu"),
    (VM_UFFD_WP, "uw"),
    (VM_LOCKED, "lo"),
    (VM_SEQ_READ, "sr"),
    (VM_RAND_READ, "rr"),
    (VM_DONTCOPY, "dc"),
    (VM_DONTEXPAND, "de"),
    (VM_LOCKONFAULT, "lf"),
    (VM_NORESERVE, "nr"),
    (VM_HUGETLB, "ht"),
    (VM_WIPEONFORK, "wf"),
    (VM_DONTDUMP, "dd"),
    (VM_HUGEPAGE, "hg"),
    (VM_MERGEABLE, "mg"),
    (VM_UFFD_MINOR, "ui"),
    (VM_SEALED, "sl"),
)
"""What /proc/pid/smaps prints on its VmFlags line, in its order.

Left out are permissions, accounting and "nh", which a process may get from prctl alike.
"""

# A present entry is an x86 one.
PTE_PRESENT: Final = 0x1
PTE_RW: Final = 0x2
PTE_USER: Final = 0x4
PTE_ACCESSED: Final = 0x20
PTE_DIRTY: Final = 0x40
PTE_PSE: Final = 0x80
PTE_SPECIAL: Final = 0x200
"""No frame that is counted stands behind it: the zero page, or device memory."""
PTE_UFFD_WP: Final = 0x400
PTE_NX: Final = 1 << 63
PFN_MASK: Final = 0x000F_FFFF_FFFF_F000

# An entry that is not zero and not present: the type in bits 1 to 3, the slot or frame as a pfn.
SWP_TYPE_MASK: Final = 0xE
SWP_SWAP: Final = 0x2
SWP_MIGRATION: Final = 0x4
SWP_MARKER: Final = 0x6
SWP_EXCLUSIVE: Final = 0x10
SWP_UFFD_WP: Final = PTE_UFFD_WP
SWP_WRITE: Final = 0x20
"""The entry that migration replaced could be written."""
MARKER_GUARD: Final = SWP_MARKER | 1 << 12
MARKER_UFFD_WP: Final = SWP_MARKER | 1 << 13 | SWP_UFFD_WP

FAULT_WRITE: Final = 1
FAULT_KERNEL: Final = 2
"""Taken in kernel mode, by a system call that accesses user memory."""
FAULT_PRESENT: Final = 4
"""An entry was present: it is a protection fault."""
FAULT_REMOTE: Final = 8
"""By get_user_pages: no exception was taken."""
FAULT_UNSHARE: Final = 16
FAULT_ALLOC: Final = 32
FAULT_FORCE: Final = 64
"""FOLL_FORCE: write what the process itself may only read."""

VM_FAULT_SIGBUS: Final = 2
VM_FAULT_MAJOR: Final = 4
VM_FAULT_SIGSEGV: Final = 64
VM_FAULT_ERROR: Final = VM_FAULT_SIGBUS | VM_FAULT_SIGSEGV
