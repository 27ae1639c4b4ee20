"""The kernel's rings while a program runs: made, drained into files, and removed.

Everything is drained from one thread, which asks every few milliseconds: a reader that the kernel
has to wake would cost the program more.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, BinaryIO, Final, Self

import attrs

from .spool import spool_page
from .syscalls import kernel_filter
from .tracefs import Instance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .sideband import SideBand
    from .tracefs import EventFormat, PageFormat, TraceFs

_PAGES: Final = 64
"""How many pages of one ring are copied before it is the next one's turn."""
_USER: Final = "address < 0x800000000000"
_PROGRAM: Final = {
    "raw_syscalls/sys_enter": kernel_filter(),
    "raw_syscalls/sys_exit": kernel_filter(),
    "exceptions/page_fault_user": "",
    "exceptions/page_fault_kernel": _USER,
    "task/task_newtask": "",
    "sched/sched_process_exec": "",
    "sched/sched_process_exit": "",
}
"""What the program's own tasks do, and on which condition it is recorded."""
_NOTIFIER: Final = {
    "kvm/kvm_unmap_hva_range": "",
    "kvm/kvm_age_hva": "",
    "kvm/kvm_test_age_hva": "",
    "kmem/rss_stat": "curr == 0",
}
"""What anybody does to memory that a VM has."""
_GUEST: Final = ("kvmmmu/kvm_mmu_pagetable_walk", "kvmmmu/kvm_mmu_set_spte")
"""What the guests of the program do; not every kernel tells."""


@attrs.define
class Ring:
    """One processor's ring of one instance, and the file that its pages go to."""

    descriptor: int
    spool: BinaryIO
    formats: dict[str, EventFormat]


class Capture:
    """A context manager. Raises RecorderError where the kernel refuses, OSError where a file does.

    `spool` makes a file; the files are their maker's, and outlive this.
    """

    def __init__(
        self,
        tracefs: TraceFs,
        name: str,
        spool: Callable[[], BinaryIO],
        *,
        announcements: bool,
        side_band: SideBand | None,
        buffer_kib: int,
    ) -> None:
        self._side_band = side_band
        self.side: Final[list[BinaryIO]] = []
        """The files with what perf has told, by processor."""
        self.rings: Final[list[Ring]] = []
        self._instances: Final[list[Instance]] = []
        self.copied = 0
        """Bytes."""
        with ExitStack() as stack:
            calls = stack.enter_context(Instance(tracefs, f"{name}-calls", buffer_kib))
            guest = [event for event in _GUEST if announcements and tracefs.has_event(event)]
            self._open(stack, calls, _PROGRAM | dict.fromkeys(guest, ""), spool)
            self._calls: Final = calls
            if announcements:
                notes = Instance(tracefs, f"{name}-notes", buffer_kib)
                self._open(stack, stack.enter_context(notes), _NOTIFIER, spool)
            for _ in range(side_band.processors if side_band is not None else 0):
                self.side.append(spool())
            self.page: Final[PageFormat] = calls.page_format()
            self._room = memoryview(bytearray(self.page.size))
            self._stack: Final = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self, pid: int) -> None:
        """Begin to record this task and what will come of it."""
        self._calls.follow(pid)
        if self._side_band is not None:
            self._side_band.start()
        for instance in reversed(self._instances):
            instance.start()

    def stop(self) -> None:
        """Record nothing more, and have everything that was."""
        for instance in self._instances:
            instance.stop()
        if self._side_band is not None:
            self._side_band.stop()
        self.drain()

    def drain(self) -> None:
        """Move what the rings hold into the files."""
        full = self.rings
        while full:
            full = [ring for ring in full if self._copy(ring) == _PAGES]
        if self._side_band is not None:
            for spool, told in zip(self.side, self._side_band.drain(), strict=True):
                spool.write(told)

    def lost(self) -> list[int]:
        """Events that found no room, by instance."""
        return [instance.lost() for instance in self._instances]

    def events(self) -> list[int]:
        """Events so far, by instance."""
        return [instance.events() for instance in self._instances]

    def _open(
        self,
        stack: ExitStack,
        instance: Instance,
        events: Mapping[str, str],
        spool: Callable[[], BinaryIO],
    ) -> None:
        self._instances.append(instance)
        for event, condition in events.items():
            instance.enable(event, condition)
        for descriptor in instance.rings():
            stack.callback(os.close, descriptor)
            self.rings.append(Ring(descriptor, spool(), instance.formats))

    def _copy(self, ring: Ring) -> int:
        """Copy at most _PAGES pages; how many there were."""
        count = 0
        with suppress(BlockingIOError):
            while count < _PAGES and os.readv(ring.descriptor, [self._room]):
                self.copied += spool_page(ring.spool, self._room, self.page)
                count += 1
        return count
