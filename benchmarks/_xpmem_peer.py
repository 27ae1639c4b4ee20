"""The other process of the XPMEM benchmarks: `python -m benchmarks._xpmem_peer BACKEND ROLE …`.

raw PATH REQUEST REPLY CHUNK BUFFER
    answers each REQUEST bytes with REPLY bytes, CHUNK at a time; BUFFER is what the socket has, or
    0 for what it has by default
exporter PATH PAGES
    exports that many pages
importer PATH SEGID SIZE
    reads that many bytes whenever a byte comes on standard input
busy PATH SEGID SIZE
    reads from one page after the other of that many bytes
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel

from mmunotify import BadAddress
from mmunotify_xpmem import RDONLY, FileSpace, Partition, StreamEngine

PAGE = 4096


async def receive(sock: socket.socket, view: memoryview) -> None:
    got = 0
    while got < len(view):
        try:
            count = sock.recv_into(view[got:])
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        if not count:
            raise EOFError
        got += count


async def send(sock: socket.socket, view: memoryview) -> None:
    sent = 0
    while sent < len(view):
        try:
            sent += sock.send(view[sent:])
        except BlockingIOError:
            await anyio.wait_writable(sock)


async def answer(sock: socket.socket, request: int, reply: int, chunk: int) -> None:
    asked, memory = memoryview(bytearray(request)), memoryview(bytearray(os.urandom(reply)))
    while True:
        await anyio.wait_readable(sock)
        await receive(sock, asked)
        for at in range(0, reply, chunk):
            await send(sock, memory[at : at + chunk])


async def raw(path: str, request: int, reply: int, chunk: int, buffer: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        sock, _ = listener.accept()
        with sock:
            sock.setblocking(False)
            if buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            try:
                await answer(sock, request, reply, chunk)
            except (EOFError, ConnectionError):
                return


async def exporter(path: str, pages: int) -> None:
    engine = StreamEngine(f"unix:{path}")
    async with FileSpace(size=pages * PAGE) as space, Partition(engine) as partition:
        group = await partition.open(space.notifiers)
        print(group.make(space.base, space.size), flush=True)
        await anyio.wait_readable(sys.stdin)


async def importer(path: str, segid: int, size: int) -> None:
    async with Partition(StreamEngine(connect=[f"unix:{path}"])) as partition:
        group = await partition.open()
        attachment = group.attach(await group.get(segid, RDONLY))
        while True:
            await attachment.read(0, size)
            print("faulted", flush=True)
            await anyio.wait_readable(sys.stdin)
            if not os.read(0, 1):
                return


async def busy(path: str, segid: int, size: int) -> None:
    async with Partition(StreamEngine(connect=[f"unix:{path}"])) as partition:
        group = await partition.open()
        attachment = group.attach(await group.get(segid, RDONLY))
        await attachment.read(0, size)
        print("faulted", flush=True)
        with suppress(BadAddress):  # until it is removed
            while True:
                for at in range(0, size, PAGE):
                    await attachment.read(at, 8)
                await anyio.lowlevel.checkpoint()


ROLES: dict[str, Any] = {"raw": raw, "exporter": exporter, "importer": importer, "busy": busy}


def main() -> None:
    backend, role, path, *numbers = sys.argv[1:]
    arguments: list[Any] = [int(number) for number in numbers]
    anyio.run(ROLES[role], path, *arguments, backend=backend)


if __name__ == "__main__":
    main()
