"""Segments: exported ranges of an address space, their ids, and who may attach them."""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING, Literal, Protocol

import attrs

from mmunotify import PAGE_SIZE

from .errors import RDWR

if TYPE_CHECKING:
    from .pfns import PfnTable
    from .wire import Buffer

Fence = Literal["lease", "kill", "never"]
"""What becomes of an importer that is silent for longer than its lease.

    lease    it is fenced: its permit is void, and nothing waits for it any longer
    kill     as soon as something waits for it, it is killed, which needs a process of this host
    never    it is waited for, for ever
"""


@attrs.frozen
class Credentials:
    """On whose behalf somebody asks. None for what the transport cannot vouch for: others' bits."""

    uid: int | None = None
    gid: int | None = None
    groups: frozenset[int] = frozenset()

    @classmethod
    def mine(cls) -> Credentials:
        """Of this process."""
        return cls(os.geteuid(), os.getegid(), frozenset(os.getgroups()))


class Memory(Protocol):
    """What an exporter copies pages from."""

    @property
    def table(self) -> PfnTable:
        """Who has which page."""
        ...

    def copy(self, first: int, need: int, count: int) -> tuple[int, Buffer] | None:
        """The bytes of `count` pages from page `first` on, or of fewer, but at least of `need`.

        None if one that is needed is not present; never suspends.
        """
        ...


class State(enum.Enum):
    """The life of a segment."""

    LIVING = "living"
    DESTROYING = "destroying"
    """`remove` has begun: faults end in SIGBUS, pages are being recalled."""
    DESTROYED = "destroyed"


@attrs.define(slots=True, eq=False)
class Segment:
    """An exported range: pages [first, first + pages) of `memory`."""

    segid: int
    memory: Memory
    first: int
    pages: int
    mode: int
    owner: Credentials
    fence: Fence = "lease"
    name: str = ""
    state: State = State.LIVING

    @property
    def last(self) -> int:
        """One past the last page."""
        return self.first + self.pages

    @property
    def start(self) -> int:
        """In bytes."""
        return self.first * PAGE_SIZE

    @property
    def size(self) -> int:
        """In bytes."""
        return self.pages * PAGE_SIZE

    def permits(self, who: Credentials, *, write: bool) -> bool:
        """Whether `who` may read, and write if `write` (ipcperms; uid 0 has CAP_IPC_OWNER)."""
        if who.uid == 0:
            return True
        owner = self.owner
        if who.uid is not None and who.uid == owner.uid:
            bits = self.mode >> 6
        elif owner.gid is not None and (who.gid == owner.gid or owner.gid in who.groups):
            bits = self.mode >> 3
        else:
            bits = self.mode
        wanted = 6 if write else 4
        return bits & wanted == wanted


def pack_id(group: int, number: int) -> int:
    """A segid or apid: {tgid:32, uniq:32}."""
    return group << 32 | number


def wants_write(flags: int) -> bool:
    """Whether the flags of `get` ask for writing."""
    return flags == RDWR
