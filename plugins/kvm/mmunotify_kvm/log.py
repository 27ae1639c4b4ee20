"""What a virtual machine writes to the log: names and keys of its events.

Those at debug are many, and written only while `VirtualMachine.trace` is True.
"""

from __future__ import annotations

from typing import Final

from mmunotify import define_event

from .counters import NAMES

MEMSLOT_CHANGED: Final = define_event(
    "kvm_memslot_changed",
    "info",
    "driver slot change base pages hva flags",
    "A memslot was created, deleted, moved, or has other flags; `base` is its first guest page.",
)
SLOTS_WAITED: Final = define_event(
    "kvm_slots_waited",
    "info",
    "driver slot sections",
    "A memslot update has to wait for this many open sections, whether they meet the slot or not.",
)
UNBALANCED: Final = define_event(
    "kvm_sections_open",
    "warning",
    "driver sections",
    "The machine was unregistered inside of this many sections, whose end it is not told.",
)
PAGE_FAULT: Final = define_event(
    "kvm_page_fault",
    "debug",
    "driver vcpu gfn write result",
    "A page fault was served (`retry`, `fixed`, `spurious`, `emulate`, `efault`); while traced.",
)
UNMAPPED: Final = define_event(
    "kvm_unmapped",
    "debug",
    "driver start end pages in_progress",
    "An invalidation of host addresses took this many mapped pages from the guest; while traced.",
)
AGED: Final = define_event(
    "kvm_aged",
    "debug",
    "driver start end young",
    "Whether the guest had used these host addresses was asked; while traced.",
)
RELEASED: Final = define_event(
    "kvm_released",
    "info",
    " ".join(("driver", *NAMES)),
    "The address space has gone: all entries are dropped, and this is what was counted.",
)
