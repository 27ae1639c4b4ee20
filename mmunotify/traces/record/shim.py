"""The shim: built on first use with the machine's C compiler, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mmunotify.errors import RecorderError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLAGS: Final = (
    *("-O2", "-shared", "-fPIC", "-nostdlib", "-ffreestanding", "-fno-stack-protector"),
    "-Wl,-z,noexecstack",
)
_HEAD: Final = re.compile(rb"@(\d{1,19}) (\d{1,9}) ([SFE]) (\d{1,4})\n")
_MAPPING: Final = re.compile(
    rb"[0-9a-f]{1,16}-[0-9a-f]{1,16} [-rwxsp]{4} [0-9a-f]{1,16} \w+:\w+ \d{1,18}[ \n]"
)
MAPS: Final = "MMUNOTIFY_RECORD_MAPS"
KVM: Final = "MMUNOTIFY_RECORD_KVM"


def cache_directory() -> Path:
    """Where the built shim is kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mmunotify"


def build() -> Path:
    """The shim as a shared object. Raises RecorderError if it cannot be built here."""
    source = files(__package__).joinpath("shim.c").read_bytes()
    name = hashlib.sha256(source + " ".join(_FLAGS).encode()).hexdigest()[:16]
    built = cache_directory() / f"shim-{name}.so"
    if built.exists():
        return built
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise RecorderError("no C compiler (cc)")
    part = built.with_name(f"{built.name}.{os.getpid()}")
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [compiler, *_FLAGS, "-x", "c", "-", "-o", part],
            input=source,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            why = next((line for line in lines if "error" in line), "it fails")
            raise RecorderError(f"the C compiler cannot build the shim: {why}")
        part.replace(built)
    except OSError as error:
        raise RecorderError(f"the shim cannot be built: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return built


def copies(text: bytes) -> Iterator[tuple[int, int, str, int, list[str]]]:
    """What the shims have told: nanoseconds, task, S F or E, errno, lines of /proc/self/maps."""
    pieces: dict[tuple[int, int, str, int], list[bytes]] = {}
    key: tuple[int, int, str, int] | None = None
    for line in text.splitlines(keepends=True):
        # A line of /proc/self/maps begins with an address.
        if line.startswith(b"@"):
            # Every program can write there, so anything may be there.
            head = _HEAD.fullmatch(line)
            key = None
            if head is not None:
                key = int(head[1]), int(head[2]), head[3].decode(), int(head[4])
                pieces.setdefault(key, [])
        elif key is not None:
            pieces[key].append(line)
    for (time, tid, kind, error), parts in pieces.items():
        lines = [line.decode(errors="surrogateescape") for line in parts if _MAPPING.match(line)]
        yield time, tid, kind, error, [" ".join(line.split(None, 5)).rstrip() for line in lines]
