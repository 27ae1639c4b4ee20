"""The kernel's tracing file system, and instances of it that are ours alone.

It is mounted detached, without a mount point: nobody sees the mount, and it is gone with the
process however that ends. What outlives a recorder that was killed are its instances, whose names
say whose they were.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from mmunotify.errors import RecorderError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
"""Numbers of system calls that are the same on every machine."""
_CLOEXEC: Final = 1
_CMD_CREATE: Final = 6

_libc: Final = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: Any) -> int:
    """A system call that has no function in Python. Raises OSError."""
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class TraceFs:
    """A context manager: the root of a tracing file system. Raises RecorderError where none is."""

    def __init__(self) -> None:
        try:
            context = syscall(_FSOPEN, b"tracefs", _CLOEXEC)
            try:
                syscall(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
                self._root: Final = syscall(_FSMOUNT, context, _CLOEXEC, 0)
            finally:
                os.close(context)
        except OSError as error:
            raise RecorderError(f"no tracefs: {error.strerror}") from error
        self.path: Final = f"/proc/self/fd/{self._root}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._root)

    def instances(self) -> list[str]:
        """The names of all instances, whoever made them."""
        return sorted(os.listdir(f"{self.path}/instances"))

    def remove(self, name: str) -> None:
        """Remove an instance; one that is gone already is fine."""
        with suppress(FileNotFoundError):
            os.rmdir(f"{self.path}/instances/{name}")

    def has_event(self, event: str) -> bool:
        """Whether this kernel has an event, such as `kvm/kvm_unmap_hva_range`."""
        return os.path.isdir(f"{self.path}/events/{event}")


_FIELD: Final = re.compile(r"field:([^;]*?)(\w+)(?:\[\w*\])?;\s*offset:(\d+);\s*size:(\d+);")


@attrs.frozen
class EventFormat:
    """Where the fields of an event are."""

    number: int
    """What its records begin with, 16 bits."""
    offsets: dict[str, int]
    """Bytes from the beginning of the record, by field."""


@attrs.frozen
class PageFormat:
    """How the pages of a ring buffer look (`events/header_page`). Bytes."""

    size: int
    data: int
    """Where records begin."""


class Instance:
    """A ring buffer per processor and its events. A context manager that removes it again.

    Raises RecorderError where the kernel refuses.
    """

    def __init__(self, tracefs: TraceFs, name: str, buffer_kib: int) -> None:
        self._tracefs = tracefs
        self.name: Final = name
        self.path: Final = f"{tracefs.path}/instances/{name}"
        self.formats: Final[dict[str, EventFormat]] = {}
        """Of the events that were enabled."""
        try:
            os.mkdir(self.path)
            self._write("tracing_on", "0")
            # Nothing that was recorded is given up for what comes later.
            self._write("options/overwrite", "0")
            self._write("trace_clock", "mono")
            self._write("buffer_size_kb", str(buffer_kib))
        except OSError as error:
            tracefs.remove(name)
            raise RecorderError(
                f"tracefs instance {name} of {buffer_kib} KiB per processor: {error.strerror}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._tracefs.remove(self.name)

    def follow(self, pid: int) -> None:
        """Record what this task does, and the tasks that it will make."""
        self._write("options/event-fork", "1")
        self._write("set_event_pid", str(pid))

    def enable(self, event: str, condition: str = "") -> None:
        """Record an event where a condition on its fields holds."""
        with open(f"{self.path}/events/{event}/format") as file:
            text = file.read()
        number = re.search(r"^ID: (\d+)", text, re.MULTILINE)
        assert number is not None
        fields = {match[2]: int(match[3]) for match in _FIELD.finditer(text)}
        self.formats[event] = EventFormat(int(number[1]), fields)
        try:
            if condition:
                self._write(f"events/{event}/filter", condition)
            self._write(f"events/{event}/enable", "1")
        except OSError as error:
            raise RecorderError(f"tracefs event {event}: {error.strerror}") from error

    def start(self) -> None:
        """Begin to record."""
        self._write("tracing_on", "1")

    def stop(self) -> None:
        """Record nothing more; what was recorded can still be read."""
        self._write("tracing_on", "0")

    def page_format(self) -> PageFormat:
        """How the pages look that `rings` give."""
        with open(f"{self._tracefs.path}/events/header_page") as file:
            text = file.read()
        at, size = next((int(m[3]), int(m[4])) for m in _FIELD.finditer(text) if m[2] == "data")
        return PageFormat(at + size, at)

    def rings(self) -> Iterator[int]:
        """A descriptor per processor, to be closed by the caller, whose reads do not block."""
        for cpu in self._cpus():
            yield os.open(
                f"{self.path}/per_cpu/{cpu}/trace_pipe_raw",
                os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC,
            )

    def lost(self) -> int:
        """How many events found no room."""
        return sum(
            sum(stats.get(reason, 0) for reason in ("overrun", "commit overrun", "dropped events"))
            for stats in self._stats()
        )

    def events(self) -> int:
        """How many events were recorded."""
        return sum(stats["entries"] + stats["read events"] for stats in self._stats())

    def _stats(self) -> Iterator[dict[str, int]]:
        for cpu in self._cpus():
            with open(f"{self.path}/per_cpu/{cpu}/stats") as file:
                yield {
                    name: int(value)
                    for name, _, value in (line.strip().partition(": ") for line in file)
                    if value.isdigit()
                }

    def _cpus(self) -> list[str]:
        return sorted(os.listdir(f"{self.path}/per_cpu"), key=lambda name: int(name[3:]))

    def _write(self, file: str, text: str) -> None:
        with open(f"{self.path}/{file}", "w") as stream:
            stream.write(text)
