"""The constants of Linux's system calls that strace shows by name, as they are on x86-64."""

from __future__ import annotations

import errno
from typing import Final


def _numbered(prefix: str, words: str) -> dict[str, int]:
    """`NAME=value` pairs in hexadecimal."""
    pairs = (word.partition("=") for word in words.split())
    return {prefix + name: int(value, 16) for name, _, value in pairs}


CONSTANTS: Final[dict[str, int]] = {
    "NULL": 0,
    "AT_FDCWD": (1 << 32) - 100,
    **{name: number for number, name in errno.errorcode.items()},
    **_numbered("PROT_", "NONE=0 READ=1 WRITE=2 EXEC=4 SEM=8 GROWSDOWN=1000000 GROWSUP=2000000"),
    **_numbered(
        "MAP_",
        "FILE=0 SHARED=1 PRIVATE=2 SHARED_VALIDATE=3 FIXED=10 ANONYMOUS=20 32BIT=40 "
        "GROWSDOWN=100 DENYWRITE=800 EXECUTABLE=1000 LOCKED=2000 NORESERVE=4000 POPULATE=8000 "
        "NONBLOCK=10000 STACK=20000 HUGETLB=40000 SYNC=80000 FIXED_NOREPLACE=100000",
    ),
    **_numbered("MREMAP_", "MAYMOVE=1 FIXED=2 DONTUNMAP=4"),
    **_numbered(
        "MADV_",
        "NORMAL=0 RANDOM=1 SEQUENTIAL=2 WILLNEED=3 DONTNEED=4 FREE=8 REMOVE=9 DONTFORK=a DOFORK=b "
        "MERGEABLE=c UNMERGEABLE=d HUGEPAGE=e NOHUGEPAGE=f DONTDUMP=10 DODUMP=11 WIPEONFORK=12 "
        "KEEPONFORK=13 COLD=14 PAGEOUT=15 POPULATE_READ=16 POPULATE_WRITE=17 DONTNEED_LOCKED=18 "
        "COLLAPSE=19 HWPOISON=64 SOFT_OFFLINE=65 GUARD_INSTALL=66 GUARD_REMOVE=67",
    ),
    **_numbered("MS_", "ASYNC=1 INVALIDATE=2 SYNC=4"),
    **_numbered("MCL_", "CURRENT=1 FUTURE=2 ONFAULT=4"),
    **_numbered("MLOCK_", "ONFAULT=1"),
    **_numbered(
        "O_",
        "RDONLY=0 WRONLY=1 RDWR=2 CREAT=40 EXCL=80 NOCTTY=100 TRUNC=200 APPEND=400 NONBLOCK=800 "
        "DSYNC=1000 DIRECT=4000 LARGEFILE=8000 DIRECTORY=10000 NOFOLLOW=20000 NOATIME=40000 "
        "CLOEXEC=80000 SYNC=101000 PATH=200000 TMPFILE=410000",
    ),
    **_numbered("MFD_", "CLOEXEC=1 ALLOW_SEALING=2 HUGETLB=4 NOEXEC_SEAL=8 EXEC=10"),
    **_numbered("CLOSE_RANGE_", "UNSHARE=2 CLOEXEC=4"),
    **_numbered(
        "CLONE_",
        "VM=100 FS=200 FILES=400 SIGHAND=800 PIDFD=1000 PTRACE=2000 VFORK=4000 PARENT=8000 "
        "THREAD=10000 NEWNS=20000 SYSVSEM=40000 SETTLS=80000 PARENT_SETTID=100000 "
        "CHILD_CLEARTID=200000 DETACHED=400000 UNTRACED=800000 CHILD_SETTID=1000000 "
        "NEWCGROUP=2000000 NEWUTS=4000000 NEWIPC=8000000 NEWUSER=10000000 NEWPID=20000000 "
        "NEWNET=40000000 IO=80000000",
    ),
    # The signal that a clone's flags end in.
    **_numbered("SIG", "CHLD=11 USR1=a USR2=c"),
    **_numbered(
        "FALLOC_FL_",
        "KEEP_SIZE=1 PUNCH_HOLE=2 NO_HIDE_STALE=4 COLLAPSE_RANGE=8 ZERO_RANGE=10 INSERT_RANGE=20 "
        "UNSHARE_RANGE=40",
    ),
    **_numbered("SYNC_FILE_RANGE_", "WAIT_BEFORE=1 WRITE=2 WAIT_AFTER=4"),
    **_numbered("IPC_", "PRIVATE=0 RMID=0 SET=1 STAT=2 INFO=3 CREAT=200 EXCL=400"),
    **_numbered("SHM_", "RDONLY=1000 RND=2000 REMAP=4000 EXEC=8000 HUGETLB=800"),
}
