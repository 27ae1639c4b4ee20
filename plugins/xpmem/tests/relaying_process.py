"""A link for the tests of real processes: carries bytes between TCP ports until it is killed."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from threading import Thread


def carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def main(port: int, target: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", target))
            for ends in ((near, far), (far, near)):
                Thread(target=carry, args=ends, daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
