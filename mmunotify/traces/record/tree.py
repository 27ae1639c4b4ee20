"""Who is in the recorded tree: its tasks, their address spaces, and which were observed.

An address space is observed from the moment on that there is a VM in it, whose announcements the
kernel traces. One that never was is named in the end, with the reason.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from .programs import program

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_VM: Final = 0x100
CLONE_THREAD: Final = 0x10000

look_up = cache(program)

_PF_KTHREAD: Final = 0x200000
_FLAGS: Final = 6
"""The field of /proc/PID/stat, counted from the one after the name."""


def kernel_tasks() -> set[int]:
    """The kernel's own threads: kswapd, kworker, ksmd, kdamond and others."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[_FLAGS]) & _PF_KTHREAD:
                found.add(int(path.parent.name))
    return found


@attrs.define(eq=False)
class Space:
    """One address space."""

    path: str
    """The program in it."""
    born: str
    """How it came to be: exec or fork."""
    observed: bool = False
    reason: str | None = None
    """Why it could not be observed, when that is known."""


class Tree:
    """The tasks of one recording as they come and go.

    One whose making was lost belongs to it from what it is next heard of.
    """

    def __init__(self, root: int) -> None:
        self._live: Final[dict[int, Space]] = {root: Space("", "exec")}
        self._unobserved: Final[Counter[tuple[str, str]]] = Counter()
        self._leaders: Final[dict[int, int]] = {}
        self.processes = 1
        """Address spaces that were made by fork, and the first."""

    def __contains__(self, tid: int) -> bool:
        return tid in self._live

    def narrow(self, tid: int) -> bool:
        """Whether a task runs a program of 32 bits, whose system calls have other numbers."""
        space = self._live.get(tid)
        return space is not None and bool(space.path) and look_up(space.path).narrow

    def cloned(self, tid: int, child: int, flags: int) -> None:
        """A task of the tree has made another."""
        parent = self._live.setdefault(tid, Space("", "fork"))
        self._leaders.pop(child, None)
        if flags & CLONE_THREAD:
            self._leaders[child] = self._leaders.get(tid, tid)
        if flags & CLONE_VM:
            self._live[child] = parent
        else:
            self.processes += 1
            self._live[child] = Space(parent.path, "fork", reason=parent.reason)

    def threads(self, leader: int) -> list[int]:
        """The other threads of a process, by its first."""
        return [tid for tid, first in self._leaders.items() if first == leader and tid in self]

    def executed(self, tid: int, path: str) -> None:
        """A task has a new program; `path` is that of the first file that was mapped for it."""
        old = self._live.get(tid)
        self._live[tid] = Space(path, "exec")
        if old is not None:
            self._left(old)

    def observed(self, tid: int, failure: str | None = None) -> None:
        """There is a VM in a task's address space from now on, or there cannot be one."""
        space = self._live.get(tid)
        if space is not None:
            space.observed = failure is None
            space.reason = failure

    def exited(self, tid: int) -> None:
        """A task is gone."""
        space = self._live.pop(tid, None)
        if space is not None:
            self._left(space)

    def unobserved(self) -> Iterator[tuple[str, str, int]]:
        """Program, reason and how often, of address spaces in which there never was a VM."""
        for space in {*self._live.values()}:
            self._live.clear()
            self._left(space)
        for (path, reason), count in sorted(self._unobserved.items()):
            yield path, reason, count

    def _left(self, space: Space) -> None:
        """A task has left an address space; the last one decides."""
        if space in self._live.values() or space.observed or not space.path:
            return
        self._unobserved[space.path, self._why(space)] += 1

    @staticmethod
    def _why(space: Space) -> str:
        found = look_up(space.path).reason if space.path else None
        if found is not None:
            return found
        if space.reason is not None:
            return space.reason
        if space.born == "fork":
            return "made by a clone that the C library did not see"
        return "started without the recorder's environment"
