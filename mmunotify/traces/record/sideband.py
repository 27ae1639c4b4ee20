"""What the kernel maps, told by perf: also what execve maps, for which there is no system call.

A dummy event per processor, which counts nothing and tells of every mapping that any process makes
or changes, by path. `perf record -d -e dummy` would do the same, a second late.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import TYPE_CHECKING, Final, Self

import attrs

from mmunotify.errors import RecorderError

from .tracefs import syscall

if TYPE_CHECKING:
    from collections.abc import Iterator

_PERF_EVENT_OPEN: Final = 298
_SOFTWARE, _DUMMY = 1, 9
_SAMPLE_TID, _SAMPLE_TIME = 1 << 1, 1 << 2
_DISABLED, _MMAP, _MMAP_DATA, _SAMPLE_ID_ALL, _MMAP2, _CLOCK = (
    1 << bit for bit in (0, 8, 17, 18, 23, 25)
)
_CLOEXEC: Final = 8
_MONOTONIC: Final = 1
_ENABLE, _DISABLE = 0x2400, 0x2401
_PAGES: Final = 256
"""Of one processor's ring; a power of two."""
_HEAD, _TAIL = 1024, 1032
"""Where the kernel and we say how far each has come."""

_ATTRIBUTES: Final = struct.Struct("=IIQQQQQIIQQQQIiQII")
"""struct perf_event_attr up to its fifth version."""
_RECORD: Final = struct.Struct("=IHH")
_MMAP2_BODY: Final = struct.Struct("=IIQQQIIQQII")
_TRAILER: Final = struct.Struct("=IIQ")
_TYPE_LOST: Final = 2
_TYPE_MMAP2: Final = 10
_LOST: Final = struct.Struct("=QQ")
_PROT: Final = ((1, "r"), (2, "w"), (4, "x"))
_SHARED: Final = 1


@attrs.frozen
class Mapped:
    """A mapping was made or changed. Bytes, nanoseconds of CLOCK_MONOTONIC."""

    time: int
    tid: int
    start: int
    end: int
    prot: str
    offset: int
    inode: int
    path: str


class SideBand:
    """A context manager. Raises RecorderError where the kernel does not let us listen."""

    def __init__(self) -> None:
        self._events: Final[list[int]] = []
        self._maps: Final[list[mmap.mmap]] = []
        attributes = _ATTRIBUTES.pack(
            *(_SOFTWARE, _ATTRIBUTES.size, _DUMMY, 0, _SAMPLE_TID | _SAMPLE_TIME, 0),
            _DISABLED | _MMAP | _MMAP_DATA | _SAMPLE_ID_ALL | _MMAP2 | _CLOCK,
            *(0, 0, 0, 0, 0, 0, 0, _MONOTONIC, 0, 0, 0),
        )
        buffer = ctypes.create_string_buffer(attributes)
        try:
            for cpu in sorted(_online()):
                event = syscall(_PERF_EVENT_OPEN, buffer, -1, cpu, -1, _CLOEXEC)
                self._events.append(event)
                self._maps.append(mmap.mmap(event, (1 + _PAGES) * mmap.PAGESIZE))
        except OSError as error:
            self.close()
            raise RecorderError(f"no perf events: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def processors(self) -> int:
        """How many there are to drain."""
        return len(self._maps)

    def close(self) -> None:
        """End for good."""
        for ring in self._maps:
            ring.close()
        for event in self._events:
            os.close(event)
        self._maps.clear()
        self._events.clear()

    def start(self) -> None:
        """Begin to listen."""
        for event in self._events:
            fcntl.ioctl(event, _ENABLE, 0)

    def stop(self) -> None:
        """Hear nothing more; what was told can still be drained."""
        for event in self._events:
            fcntl.ioctl(event, _DISABLE, 0)

    def drain(self) -> Iterator[bytes]:
        """What each processor has told since, in the order of the processors."""
        size = _PAGES * mmap.PAGESIZE
        for ring in self._maps:
            (head,) = struct.unpack_from("=Q", ring, _HEAD)
            (tail,) = struct.unpack_from("=Q", ring, _TAIL)
            begin, length = tail % size, head - tail
            first = min(length, size - begin)
            at = mmap.PAGESIZE + begin
            told = ring[at : at + first] + ring[mmap.PAGESIZE : mmap.PAGESIZE + length - first]
            struct.pack_into("=Q", ring, _TAIL, head)
            yield told


def _online() -> set[int]:
    """The processors that are in use."""
    with open("/sys/devices/system/cpu/online") as file:
        spans = (span.partition("-") for span in file.read().strip().split(","))
        return {
            cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)
        }


def parse(told: bytes) -> tuple[list[Mapped], int, int]:
    """Whole records of one processor: the mappings, how many records were lost, the bytes used."""
    found: list[Mapped] = []
    lost = at = 0
    while at + _RECORD.size <= len(told):
        kind, _misc, size = _RECORD.unpack_from(told, at)
        if at + size > len(told):
            break
        body = at + _RECORD.size
        at += size
        if kind == _TYPE_LOST:
            lost += _LOST.unpack_from(told, body)[1]
        elif kind == _TYPE_MMAP2:
            _pid, tid, start, length, offset, _, _, inode, _, prot, flags = _MMAP2_BODY.unpack_from(
                told, body
            )
            (_, _, time) = _TRAILER.unpack_from(told, at - _TRAILER.size)
            path = told[body + _MMAP2_BODY.size : at - _TRAILER.size].partition(b"\0")[0]
            letters = "".join(letter if prot & bit else "-" for bit, letter in _PROT)
            letters += "s" if flags & _SHARED else "p"
            text = path.decode(errors="surrogateescape").replace("\n", "\\012")
            place = offset if inode else 0
            found.append(Mapped(time, tid, start, start + length, letters, place, inode, text))
    return found, lost, at
