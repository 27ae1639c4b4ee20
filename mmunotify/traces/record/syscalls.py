"""The system calls that a recording has: those on memory, processes, descriptors and file sizes.

read(2), write(2) and all others are left out in the kernel. Numbers are those of x86-64, the only
machine whose kernel route is known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable


@attrs.frozen
class Syscall:
    """One system call of x86-64, and how many of its arguments are written down."""

    name: str
    number: int
    arguments: int


SYSCALLS: Final = tuple(
    Syscall(*fields)
    for fields in (
        ("open", 2, 3),
        ("close", 3, 1),
        ("mmap", 9, 6),
        ("mprotect", 10, 3),
        ("munmap", 11, 2),
        ("brk", 12, 1),
        ("mremap", 25, 5),
        ("msync", 26, 3),
        ("madvise", 28, 3),
        ("shmget", 29, 3),
        ("shmat", 30, 3),
        ("shmctl", 31, 3),
        ("dup", 32, 1),
        ("dup2", 33, 2),
        ("clone", 56, 5),
        ("fork", 57, 0),
        ("vfork", 58, 0),
        ("execve", 59, 0),
        ("exit", 60, 1),
        ("shmdt", 67, 1),
        ("fsync", 74, 1),
        ("fdatasync", 75, 1),
        ("truncate", 76, 2),
        ("ftruncate", 77, 2),
        ("creat", 85, 2),
        ("mlock", 149, 2),
        ("munlock", 150, 2),
        ("mlockall", 151, 1),
        ("munlockall", 152, 0),
        ("sync", 162, 0),
        ("remap_file_pages", 216, 5),
        ("exit_group", 231, 1),
        ("mbind", 237, 6),
        ("openat", 257, 4),
        ("sync_file_range", 277, 4),
        ("fallocate", 285, 4),
        ("dup3", 292, 3),
        ("syncfs", 306, 1),
        ("memfd_create", 319, 2),
        ("execveat", 322, 0),
        ("userfaultfd", 323, 1),
        ("mlock2", 325, 3),
        ("pkey_mprotect", 329, 4),
        ("clone3", 435, 2),
        ("close_range", 436, 3),
        ("openat2", 437, 4),
        ("process_madvise", 440, 5),
        ("mseal", 462, 3),
    )
)
BY_NUMBER: Final = {call.number: call for call in SYSCALLS}
BY_NAME: Final = {call.name: call for call in SYSCALLS}


def kernel_filter(numbers: Iterable[int] = BY_NUMBER) -> str:
    """An event filter on `id`: a search by halves, since the kernel asks it for every call."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return _search(spans)


def _search(spans: list[list[int]]) -> str:
    if len(spans) == 1:
        first, last = spans[0]
        return f"id == {first}" if first == last else f"id >= {first} && id <= {last}"
    middle = len(spans) // 2
    low, high = _search(spans[:middle]), _search(spans[middle:])
    border = spans[middle][0]
    return f"(id < {border} && ({low})) || (id >= {border} && ({high}))"
