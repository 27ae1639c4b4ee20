"""Processes at the other end of a socket: who they are, whether they live, and killing them.

The kernel says who connected to a Unix socket, and gives a pidfd for it, which is never another
process's: its being readable is proof that the process is dead.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import anyio

from .segments import Credentials

if TYPE_CHECKING:
    from .engine import Sender

_SO_PEERGROUPS: Final = 59
_SO_PEERPIDFD: Final = 77
"""Linux 6.5."""
_UCRED: Final = struct.Struct("=iII")
_MAX_GROUPS: Final = 65536


class ProcessSender:
    """The process at the other end of one link. Closes its pidfd when nobody knows it any more."""

    def __init__(self, credentials: Credentials, pid: int | None, pidfd: int, name: str) -> None:
        self.credentials: Final = credentials
        self.pid: Final = pid
        self._pidfd: Final = pidfd
        self._name: Final = name

    def __str__(self) -> str:
        return self._name

    def __del__(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)

    @classmethod
    def of(cls, sock: socket.socket) -> ProcessSender:
        """Who is at the other end of a connected socket, as far as the kernel knows."""
        if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
            try:
                where = ":".join(map(str, sock.getpeername()[:2]))
            except OSError:
                where = "somebody who has left"
            return cls(Credentials(), None, -1, f"tcp {where}")
        packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(packed)
        return cls(
            Credentials(uid, gid, _groups(sock)), pid, _pidfd(sock, pid), f"pid {pid} of user {uid}"
        )

    @property
    def killable(self) -> bool:
        """Whether it is another process of this host, of which there is a pidfd."""
        return self._pidfd >= 0 and self.pid != os.getpid()

    def is_same(self, other: Sender) -> bool:
        """Whether `other` is the same process, over another link perhaps.

        Of TCP nobody knows it: there, permits alone, which nobody else can guess, tell.
        """
        return (
            isinstance(other, ProcessSender)
            and other.pid == self.pid
            and other.credentials.uid == self.credentials.uid
        )

    async def kill(self) -> int:
        """SIGKILL; returns the pid once the process is dead."""
        assert self.killable
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.exited()
        assert self.pid is not None
        return self.pid

    async def exited(self) -> None:
        """Return once the process is dead; never, if the kernel cannot tell."""
        if self._pidfd < 0:
            await anyio.sleep_forever()
        # One of its own: only one task can wait for a descriptor.
        waited_for = os.dup(self._pidfd)
        try:
            await anyio.wait_readable(waited_for)
        finally:
            os.close(waited_for)


def _pidfd(sock: socket.socket, pid: int) -> int:
    with suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    with suppress(AttributeError, OSError):
        return os.pidfd_open(pid)
    return -1


def _groups(sock: socket.socket) -> frozenset[int]:
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS)
    except OSError:
        return frozenset()
    return frozenset(group for (group,) in struct.iter_unpack("=I", packed))
