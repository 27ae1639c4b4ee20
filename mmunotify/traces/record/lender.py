"""Lends /dev/kvm to processes that may not open it, through an abstract socket."""

from __future__ import annotations

import os
import socket
from typing import Final, Self


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
            with borrower:
                socket.send_fds(borrower, [b"k"], [self._kvm])
