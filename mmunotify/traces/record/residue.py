"""What a recorder leaves behind if it is killed, and how the next one finds and removes it.

Its tracefs instances, and one directory with the shim for programs to load. Their names say whose
they are: a process number and when that process was started, since numbers are used again.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .tracefs import TraceFs

_NAME: Final = re.compile(r"mmunotify-(\d+)-(\d+)(?:-\w+)?")
_STARTED: Final = 19
"""The field of /proc/PID/stat, counted from the one after the name."""


def own_name() -> str:
    """What the names of everything that this process leaves begin with."""
    pid = os.getpid()
    return f"mmunotify-{pid}-{_started(pid)}"


def directories() -> list[Path]:
    """Where programs can load a shared object from, whoever they run as; best first."""
    places = dict.fromkeys(
        (Path(tempfile.gettempdir()), Path("/tmp"), Path("/run"), Path("/dev/shm"))
    )
    return [
        place
        for place in places
        if os.access(place, os.W_OK) and not os.statvfs(place).f_flag & os.ST_NOEXEC
    ]


def recorders(names: Iterable[str]) -> list[int]:
    """Of the recorders that these names tell of, those other than this process that still run."""
    owners = {_owner(name) for name in names} - {None, (os.getpid(), _started(os.getpid()))}
    return sorted(pid for pid, started in filter(None, owners) if _started(pid) == started)


def orphans(tracefs: TraceFs | None) -> tuple[list[str], list[Path]]:
    """What recorders have left that are no more: tracefs instances, and directories."""
    names = tracefs.instances() if tracefs is not None else []
    paths = [path for place in directories() for path in place.glob("mmunotify-*")]
    return [name for name in names if _orphaned(name)], [
        path for path in paths if _orphaned(path.name)
    ]


def remove(tracefs: TraceFs | None) -> list[str]:
    """Remove the orphans; returns what they were."""
    names, paths = orphans(tracefs)
    for name in names:
        assert tracefs is not None
        tracefs.remove(name)
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    return [*(f"tracefs instance {name}" for name in names), *map(str, paths)]


def _orphaned(name: str) -> bool:
    owner = _owner(name)
    return owner is not None and _started(owner[0]) != owner[1]


def _owner(name: str) -> tuple[int, int] | None:
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def _started(pid: int) -> int | None:
    """When a process was started, in the kernel's ticks; None if there is none."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[_STARTED])
    return None
