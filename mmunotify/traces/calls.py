"""Recorded system calls, done to the model: one method each, with its arguments and its result."""

from __future__ import annotations

from contextlib import suppress
from errno import EBUSY, EINVAL, ENOMEM
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from mmunotify.errors import MmError
from mmunotify.model import flags as f
from mmunotify.model.vma import find_vma
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE

from .tasks import Descriptor, OpenFile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from mmunotify.model.filemap import File, Kind
    from mmunotify.model.machine import Machine
    from mmunotify.model.vma import Vma

    from .decode import Mapping
    from .tasks import Space, Task

    _Handler: TypeAlias = Callable[[Task, tuple[int, ...], int], Awaitable[None]]

ERRORS: Final = (1 << 64) - 4095
"""Results from here up are negative errnos."""
_O_CLOEXEC: Final = 0x80000
_MEMORY_FILES: Final = (
    "/dev/shm/",
    "/dev/zero",
    "/memfd:",
    "/SYSV",
    "/anon_hugepage",
    "[",
    "anon_",
)
"""Paths of files that live in memory alone; all others are taken to be on a disk."""
_ADVICE: Final = {
    **dict(enumerate(("normal", "random", "sequential", "willneed", "dontneed"))),
    **dict(enumerate(("free", "remove", "dontfork", "dofork"), 8)),
    **dict(enumerate(("mergeable", "unmergeable", "hugepage", "nohugepage"), 12)),
    **dict(enumerate(("dontdump", "dodump", "wipeonfork", "keeponfork", "cold", "pageout"), 16)),
    **dict(enumerate(("populate_read", "populate_write", "dontneed_locked", "collapse"), 22)),
    102: "guard_install",
    103: "guard_remove",
}
_FALLOC: Final = {0x02: "punch", 0x08: "collapse", 0x10: "zero"}
_MS_SYNC: Final = 4
_CLOSE_RANGE_CLOEXEC: Final = 4
_MCL_CURRENT: Final = 1
_MCL_ONFAULT: Final = 4
_PARTLY: Final = frozenset((ENOMEM, EINVAL, EBUSY))
"""With these a call may fail after some of its work, because of what is mapped: model and kernel
have to agree. For others (limits, permissions, descriptors) the kernel has reasons of its own."""

EXECS: Final = frozenset(("execve", "execveat"))
WRITERS: Final = frozenset(
    (
        *("mmap", "munmap", "mprotect", "pkey_mprotect", "mremap", "brk", "remap_file_pages"),
        *("clone", "clone3", "vfork", "fork", "shmat"),
    )
)
"""Calls that hold mmap_lock for writing: what faults meanwhile may have to wait."""


class Calls:
    """The files of a machine, and what system calls do to it."""

    def __init__(self, machine: Machine[Any], spaces: Iterable[Space]) -> None:
        self._machine = machine
        self._spaces = spaces
        self._files: Final[dict[tuple[int, str], File]] = {}
        self.inferred = 0
        """Pages that write(2) had dirtied, known only from the announcements of their writeback."""
        self._handlers: Final[
            dict[str, Callable[[Task, tuple[int, ...], int], Awaitable[None]]]
        ] = {
            "mmap": self._mmap,
            "munmap": self._munmap,
            "mprotect": self._mprotect,
            "mremap": self._mremap,
            "madvise": self._madvise,
            "process_madvise": self._process_madvise,
            "brk": self._brk,
            "mlock": self._mlock,
            "mlock2": self._mlock,
            "munlock": self._munlock,
            "mlockall": self._mlockall,
            "munlockall": self._munlockall,
            "mseal": self._mseal,
            "pkey_mprotect": self._mprotect,
            "remap_file_pages": self._shmat,
            "msync": self._msync,
            "shmat": self._shmat,
            "shmdt": self._shmdt,
            "open": self._open,
            "openat": self._openat,
            "openat2": self._made,
            "memfd_create": self._made,
            "creat": self._made,
            "dup": self._dup,
            "dup2": self._dup,
            "dup3": self._dup,
            "close": self._close,
            "close_range": self._close_range,
            "truncate": self._truncate,
            "ftruncate": self._ftruncate,
            "fallocate": self._fallocate,
            "fsync": self._writeback,
            "fdatasync": self._writeback,
            "sync_file_range": self._writeback,
            "sync": self._sync,
            "syncfs": self._sync,
        }

    async def do(self, task: Task, name: str, args: tuple[int, ...], result: int) -> bool:
        """Do one call; one that it does not know changes no memory. Raises MmError.

        False if there is nothing to do: the kernel refused it for reasons that are not in a
        recording.
        """
        handler = self._handlers.get(name)
        if handler is None:
            return False
        failed = result >= ERRORS
        tried = name in _TRIED and (1 << 64) - result in _PARTLY
        if failed and not tried and not task.kernel:
            return False
        await handler(task, args, result)
        if failed and name not in _TRIED:
            raise MmError((1 << 64) - result, f"{name}: refused when all had been done")
        return True

    def file(self, mapping: Mapping) -> File:
        """The file behind a mapping, as large as what is mapped of it at least."""
        key = (mapping.inode, mapping.path)
        file = self._files.get(key)
        size = mapping.offset + mapping.end - mapping.start
        if file is None:
            kind: Kind = "memfd" if mapping.path.startswith(_MEMORY_FILES) else "ext4"
            file = self._machine.file(pages=size >> PAGE_SHIFT, kind=kind)
            self._files[key] = file
        file.size = max(file.size, size)
        return file

    async def place(self, space: Space, mapping: Mapping) -> None:
        """Map what execve maps, for which there is no system call."""
        flags = f.MAP_FIXED | (f.MAP_SHARED if mapping.prot.endswith("s") else f.MAP_PRIVATE)
        file = None
        if mapping.path == "[stack]":
            flags |= f.MAP_GROWSDOWN | f.MAP_ANONYMOUS
        elif mapping.path in {"//anon", "[heap]"}:
            flags |= f.MAP_ANONYMOUS
        else:
            file = self.file(mapping)
        prot = sum(
            bit
            for letter, bit in (("r", f.PROT_READ), ("w", f.PROT_WRITE), ("x", f.PROT_EXEC))
            if letter in mapping.prot
        )
        length = mapping.end - mapping.start
        offset = 0 if file is None else mapping.offset
        await space.mm.mmap(length, prot, flags, file, offset, addr=mapping.start)
        if mapping.path == "[stack]":
            # The arguments and the environment are there already.
            await space.mm.access(mapping.end - 1, write=True)

    # ------------------------------------------------------------------ mappings

    async def _mmap(self, task: Task, args: tuple[int, ...], result: int) -> None:
        _, length, prot, flags, fd, offset = args
        if result >= ERRORS:
            await self._unmade(task, prot, flags)
            return
        file = None
        if not flags & f.MAP_ANONYMOUS:
            if task.mapping is None:
                raise MmError(0, f"mmap at {result:#x}: no mapping recorded that names the file")
            file = self.file(task.mapping)
            descriptor = task.files.setdefault(fd & 0xFFFF_FFFF, Descriptor(OpenFile()))
            descriptor.open.file = file
        elif flags & f.MAP_SHARED and task.mapping is not None:
            file = self.file(task.mapping)
            flags &= ~f.MAP_ANONYMOUS
        flags &= ~(f.MAP_FIXED_NOREPLACE | f.MAP_HUGETLB)
        await _mm(task).mmap(length, prot, flags | f.MAP_FIXED, file, offset, addr=result)

    async def _unmade(self, task: Task, prot: int, flags: int) -> None:
        """A mmap that failed when it had made room, or the mapping, and took that away again."""
        mm = _mm(task)
        for start, end in task.kernel:
            if not mm.find_vma(start >> PAGE_SHIFT):
                flags = flags & f.MAP_SHARED or f.MAP_PRIVATE
                flags |= f.MAP_FIXED | f.MAP_ANONYMOUS
                await mm.mmap(end - start, prot, flags, addr=start)
            await mm.munmap(start, end - start)

    async def _munmap(self, task: Task, args: tuple[int, ...], result: int) -> None:
        await _mm(task).munmap(args[0], args[1])

    async def _mprotect(self, task: Task, args: tuple[int, ...], result: int) -> None:
        await _mm(task).mprotect(*args[:3])

    async def _mremap(self, task: Task, args: tuple[int, ...], result: int) -> None:
        if result >= ERRORS:
            return
        old, old_size, new_size, flags = args[:4]
        if result == old and not flags & f.MREMAP_DONTUNMAP:
            await _mm(task).mremap(old, old_size, new_size)
        else:
            flags |= f.MREMAP_MAYMOVE | f.MREMAP_FIXED
            await _mm(task).mremap(old, old_size, new_size, flags, result)

    async def _madvise(self, task: Task, args: tuple[int, ...], result: int) -> None:
        advice = _ADVICE.get(args[2])
        if result >= ERRORS and advice in {None, "collapse"}:
            # An unknown number; or huge pages, whether they are allowed is not in a recording.
            raise MmError((1 << 64) - result, "refused when it was recorded")
        if advice is not None:
            await _mm(task).madvise(args[0], args[1], advice)

    async def _process_madvise(self, task: Task, args: tuple[int, ...], result: int) -> None:
        """Which ranges it is about, and in whose memory, only their announcements say."""
        advice = _ADVICE.get(args[3])
        if advice is None:
            return
        for start, end in task.kernel:
            for space in (task.space, *self._spaces):
                if space is not None and space.mm.find_vma(start >> PAGE_SHIFT) is not None:
                    self.inferred += (end - start) >> PAGE_SHIFT
                    await space.mm.madvise(start, end - start, advice)
                    break

    async def _brk(self, task: Task, args: tuple[int, ...], result: int) -> None:
        space = task.space
        assert space is not None
        if not space.brk_known:
            space.mm.brk_start = space.mm.brk_end = result
            space.brk_known = True
        elif args[0]:
            await space.mm.brk(result)

    async def _mlock(self, task: Task, args: tuple[int, ...], result: int) -> None:
        await _mm(task).mlock(args[0], args[1], onfault=len(args) > 2 and bool(args[2] & 1))

    async def _munlock(self, task: Task, args: tuple[int, ...], result: int) -> None:
        await _mm(task).munlock(args[0], args[1])

    async def _mlockall(self, task: Task, args: tuple[int, ...], result: int) -> None:
        # What is mapped later (MCL_FUTURE) is faulted in by the call that maps it.
        mm = _mm(task)
        for vma in list(mm.vmas) if args[0] & _MCL_CURRENT else ():
            with suppress(MmError):
                await mm.mlock(vma.start, vma.end - vma.start, onfault=bool(args[0] & _MCL_ONFAULT))

    async def _munlockall(self, task: Task, args: tuple[int, ...], result: int) -> None:
        mm = _mm(task)
        for vma in list(mm.vmas):
            await mm.munlock(vma.start, vma.end - vma.start)

    async def _mseal(self, task: Task, args: tuple[int, ...], result: int) -> None:
        await _mm(task).mseal(args[0], args[1])

    async def _msync(self, task: Task, args: tuple[int, ...], result: int) -> None:
        how = "sync" if args[2] & _MS_SYNC else "async"
        await _mm(task).msync(args[0], args[1], how)

    async def _shmat(self, task: Task, args: tuple[int, ...], result: int) -> None:
        if task.mapping is not None and task.space is not None:
            await self.place(task.space, task.mapping)

    async def _shmdt(self, task: Task, args: tuple[int, ...], result: int) -> None:
        mm = _mm(task)
        vma = find_vma(mm, args[0] >> PAGE_SHIFT)
        if vma is not None and vma.start == args[0]:
            await mm.munmap(vma.start, vma.end - vma.start)

    # ------------------------------------------------------------------ descriptors

    async def _openat(self, task: Task, args: tuple[int, ...], result: int) -> None:
        await self._open(task, args[1:], result)

    async def _open(self, task: Task, args: tuple[int, ...], result: int) -> None:
        task.files[result] = Descriptor(OpenFile(), bool(args[1] & _O_CLOEXEC))

    async def _made(self, task: Task, args: tuple[int, ...], result: int) -> None:
        task.files[result] = Descriptor(OpenFile())

    async def _dup(self, task: Task, args: tuple[int, ...], result: int) -> None:
        old = task.files.setdefault(args[0] & 0xFFFF_FFFF, Descriptor(OpenFile()))
        task.files[result] = Descriptor(old.open, len(args) > 2 and bool(args[2] & _O_CLOEXEC))

    async def _close(self, task: Task, args: tuple[int, ...], result: int) -> None:
        task.files.pop(args[0] & 0xFFFF_FFFF, None)

    async def _close_range(self, task: Task, args: tuple[int, ...], result: int) -> None:
        first, last, flags = args
        for fd in [fd for fd in task.files if first <= fd <= last]:
            if flags & _CLOSE_RANGE_CLOEXEC:
                task.files[fd].close_on_exec = True
            else:
                del task.files[fd]

    async def _truncate(self, task: Task, args: tuple[int, ...], result: int) -> None:
        """By path, which is not recorded: of the file whose mappings it was announced to."""
        vma = self._mapped(task, task.kernel[0][0]) if task.kernel else None
        if vma is not None and vma.file is not None:
            await self._machine.truncate(vma.file, args[1])

    async def _ftruncate(self, task: Task, args: tuple[int, ...], result: int) -> None:
        file = _opened(task, args[0])
        if file is not None:
            await self._machine.truncate(file, args[1])

    async def _fallocate(self, task: Task, args: tuple[int, ...], result: int) -> None:
        file = _opened(task, args[0])
        if file is None:
            return
        for bit, mode in _FALLOC.items():
            if args[1] & bit:
                await self._machine.fallocate(file, mode, args[2], args[3])
                return
        file.size = max(file.size, args[2] + args[3])

    async def _writeback(self, task: Task, args: tuple[int, ...], result: int) -> None:
        """Write a file back, having dirtied first what the kernel found dirty.

        Most of that was dirtied by write(2), which is not recorded; that it was, the kernel's
        announcements say.
        """
        opened = _opened(task, args[0])
        await self._write_back(task, [opened] if opened is not None else [])

    async def _sync(self, task: Task, args: tuple[int, ...], result: int) -> None:
        await self._write_back(task, self._files.values())

    async def _write_back(self, task: Task, known: Iterable[File]) -> None:
        files = dict.fromkeys(known)
        own = task.space.mm if task.space is not None else None
        vma: Vma | None = None
        for start, end in task.kernel:
            for address in range(start, end, PAGE_SIZE):
                page = address >> PAGE_SHIFT
                # A run of pages is mostly in one mapping, and the task's own comes first.
                if vma is None or vma.mm is not own or not vma.first <= page < vma.last:
                    vma = self._mapped(task, address)
                if vma is None or vma.file is None:
                    continue
                files[vma.file] = None
                if not vma.mm.access_nowait(address):
                    await vma.mm.access(address)
                index = page - vma.first + vma.pgoff
                if not vma.file.rewrite(index):
                    await vma.file.pwrite(index << PAGE_SHIFT, b"\0")
                self.inferred += 1
        for file in files:
            await self._machine.fsync(file)

    def _mapped(self, task: Task, address: int) -> Vma | None:
        """The mapping of a file at an address: in the task's own address space, or in any."""
        spaces = (task.space, *self._spaces)
        found = (find_vma(space.mm, address >> PAGE_SHIFT) for space in spaces if space is not None)
        return next((vma for vma in found if vma is not None and vma.flags & f.VM_SHARED), None)


def _mm(task: Task) -> Any:
    assert task.space is not None
    return task.space.mm


def _opened(task: Task, fd: int) -> File | None:
    descriptor = task.files.get(fd & 0xFFFF_FFFF)
    return descriptor.open.file if descriptor is not None else None


_TRIED: Final = frozenset(
    (
        *("munmap", "mprotect", "pkey_mprotect", "madvise", "mlock", "mlock2", "munlock", "msync"),
        *("mseal",),
    )
)
"""Calls that are done even if they failed, since they may have done a part."""
