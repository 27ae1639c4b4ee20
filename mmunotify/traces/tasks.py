"""Who is who in a recording: tasks, the address spaces and the descriptor tables they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from mmunotify import AnyDriver
    from mmunotify.model.filemap import File
    from mmunotify.model.mm import AddressSpace

    from .decode import Call, Mapping
    from .matching import Span
    from .touching import Toucher

CLONE_VM: Final = 0x100
CLONE_FILES: Final = 0x400
CLONE_THREAD: Final = 0x10000
CODE_PRESENT: Final = 1
CODE_WRITE: Final = 2
_PROTECTED: Final = CODE_PRESENT | CODE_WRITE


@attrs.define(eq=False)
class Space:
    """One address space of the replay. Ends when the last of its tasks does."""

    mm: AddressSpace[Any]
    drivers: list[AnyDriver]
    """The drivers that were attached, in the order of the meters."""
    toucher: Toucher | None
    """None without a device to use memory."""
    tasks: int = 1
    recorded: bool = False
    """The kernel's announcements are in the recording from here on."""
    brk_known: bool = False
    guest: int | None = None
    """Where the memory of its guest begins, if it is a hypervisor."""
    held: list[Fault] = attrs.field(factory=list)
    """Faults that wait for a system call to let go of mmap_lock."""
    writers: int = 0
    """System calls under way that hold mmap_lock for writing."""

    def waits(self, task: Task, code: int) -> bool:
        """Whether a fault waits: somebody has mmap_lock, and may be write-protecting the page."""
        return self.writers != 0 and code & _PROTECTED == _PROTECTED and task.call is None


@attrs.define(eq=False)
class Fault:
    """A page fault, or the last one of a run, until its task goes on."""

    task: Task
    address: int
    pages: int
    """Of the run whose first page has `address`."""
    write: bool
    kernel: list[Span] = attrs.field(factory=list)
    """What the kernel announced in it."""
    model: list[Span] | None = None
    """What the model did; None before it was done."""


@attrs.define(eq=False)
class OpenFile:
    """What descriptors refer to; which file that is, is known when it has been mapped."""

    file: File | None = None


@attrs.define(eq=False)
class Descriptor:
    """One number of a descriptor table."""

    open: OpenFile
    close_on_exec: bool = False


@attrs.define(eq=False)
class Task:
    """One thread, from the clone that makes it (or its first event) to its exit."""

    tid: int
    space: Space | None
    """None for a task of the kernel, and for what is not in the recorded tree."""
    files: dict[int, Descriptor]
    leader: int = attrs.field(default=attrs.Factory(lambda task: task.tid, takes_self=True))
    """The task whose number the whole group has."""
    call: Call | None = None
    """The system call that it is in."""
    mapping: Mapping | None = None
    """The mapping that the kernel made in it."""
    replacing: bool = False
    """In an execve that has put the new address space in place."""
    kernel: list[Span] = attrs.field(factory=list)
    """What the kernel announced in it so far."""
    model: list[Span] = attrs.field(factory=list)
    """What the model announced for it so far."""
    fault: Fault | None = None
    aged: Span | None = None
    """What it has just asked the age of: an announcement of the same is reclaim."""
    reclaimed: Span | None = None
    """Waits for the next event, which may name the owner."""
