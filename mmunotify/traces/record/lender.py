"""Lends /dev/kvm to recorded processes that may not open it, through an abstract socket.

Anybody can connect to that; only who descends from the recorder is lent to.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import Final, Self

_CREDENTIALS: Final = struct.Struct("=iII")
"""Process, user, group."""


class Lender:
    """A context manager; whoever connects while it is served gets a descriptor."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self._kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{name}")
        self._socket.listen(128)
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
        os.close(self._kvm)

    def fileno(self) -> int:
        """To be waited for until somebody connects."""
        return self._socket.fileno()

    def serve(self) -> None:
        """Lend to all who have connected."""
        while True:
            try:
                borrower, _ = self._socket.accept()
            except BlockingIOError:
                return
            with borrower, suppress(OSError):
                who = borrower.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _descends(_CREDENTIALS.unpack(who)[0]):
                    socket.send_fds(borrower, [b"k"], [self._kvm])


def _descends(pid: int) -> bool:
    """Whether a process is of this one's making: orphans come back to their recorder."""
    me = os.getpid()
    while pid > 1 and pid != me:
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == me
