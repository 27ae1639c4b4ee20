"""XPMEM for mmunotify: memory shared across partitions, and nothing stale when one dies.

    xpmem = Xpmem()                          # the device of this process, or
    async with Partition(engine) as xpmem:   # one that reaches other processes
        async with xpmem.opened(mm.notifiers) as group:
            segid = group.make(address, size, 0o660)

What is public is here; it is imported when it is first used, since listing drivers imports this
module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmunotify import Capability, DriverSpec

from .options import XpmemOptions as XpmemOptions

if TYPE_CHECKING:
    from .attachment import Attachment as Attachment
    from .driver import DeferredXpmemDriver as DeferredXpmemDriver
    from .driver import XpmemDriver as XpmemDriver
    from .engine import Engine as Engine
    from .errors import MAXADDR_SIZE as MAXADDR_SIZE
    from .errors import PERMIT_MODE as PERMIT_MODE
    from .errors import RDONLY as RDONLY
    from .errors import RDWR as RDWR
    from .errors import XPMEM_ERRNO_NOPROC as XPMEM_ERRNO_NOPROC
    from .errors import ExporterGone as ExporterGone
    from .errors import FencedError as FencedError
    from .errors import XpmemError as XpmemError
    from .file_space import FileSpace as FileSpace
    from .memory_engine import MemoryHub as MemoryHub
    from .partition import Partition as Partition
    from .segments import Credentials as Credentials
    from .stream_engine import StreamEngine as StreamEngine
    from .thread_group import ThreadGroup as ThreadGroup
    from .xpmem import Xpmem as Xpmem

DRIVER = DriverSpec(
    name="xpmem",
    api=(1, 0),
    summary="shares memory across partitions; waits for importers in its callbacks",
    capabilities=frozenset({Capability.SLEEPABLE, Capability.NONBLOCK}),
    factory="mmunotify_xpmem.driver:XpmemDriver",
    config=XpmemOptions,
)
DEFERRED = DriverSpec(
    name="xpmem-deferred",
    api=(1, 0),
    summary="the same where nobody may sleep: marks, and waits after the locks are dropped",
    capabilities=frozenset({Capability.DEFERRED, Capability.NONBLOCK}),
    factory="mmunotify_xpmem.driver:DeferredXpmemDriver",
    config=XpmemOptions,
)

_HOMES = {
    "attachment": ("Attachment",),
    "driver": ("DeferredXpmemDriver", "XpmemDriver"),
    "engine": ("Engine",),
    "errors": (
        *("MAXADDR_SIZE", "PERMIT_MODE", "RDONLY", "RDWR", "XPMEM_ERRNO_NOPROC"),
        *("ExporterGone", "FencedError", "XpmemError"),
    ),
    "file_space": ("FileSpace",),
    "memory_engine": ("MemoryHub",),
    "partition": ("Partition",),
    "segments": ("Credentials",),
    "stream_engine": ("StreamEngine",),
    "thread_group": ("ThreadGroup",),
    "xpmem": ("Xpmem",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)
