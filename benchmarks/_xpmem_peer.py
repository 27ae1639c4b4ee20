"""The other process of the XPMEM benchmarks: `python -m benchmarks._xpmem_peer BACKEND ROLE …`.

raw PATH REQUEST REPLY      answers each REQUEST bytes with REPLY bytes, without any protocol
stream PATH CHUNK COUNT     answers each byte with COUNT chunks
exporter PATH PAGES         exports that many pages
importer PATH SEGID         faults the first page in whenever a byte comes on standard input
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import anyio

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


async def answer(sock: socket.socket, request: int, reply: int, times: int) -> None:
    asked, answered = memoryview(bytearray(request)), memoryview(bytes(reply))
    while True:
        await anyio.wait_readable(sock)
        await receive(sock, asked)
        for _ in range(times):
            await send(sock, answered)


async def raw(path: str, request: int, reply: int, times: int = 1) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        sock, _ = listener.accept()
        with sock:
            sock.setblocking(False)
            try:
                await answer(sock, request, reply, times)
            except (EOFError, ConnectionError):
                return


async def exporter(path: str, pages: int) -> None:
    engine = StreamEngine(f"unix:{path}")
    async with FileSpace(size=pages * PAGE) as space, Partition(engine) as partition:
        group = await partition.open(space.notifiers)
        print(group.make(space.base, space.size), flush=True)
        await anyio.wait_readable(sys.stdin)


async def importer(path: str, segid: int) -> None:
    async with Partition(StreamEngine(connect=[f"unix:{path}"])) as partition:
        group = await partition.open()
        attachment = group.attach(await group.get(segid, RDONLY))
        while True:
            await attachment.read(0, 1)
            print("faulted", flush=True)
            await anyio.wait_readable(sys.stdin)
            if not os.read(0, 1):
                return


def main() -> None:
    backend, role, path, *numbers = sys.argv[1:]
    arguments: list[Any] = [int(number) for number in numbers]
    match role:
        case "raw":
            request, reply = arguments
            anyio.run(raw, path, request, reply, backend=backend)
        case "stream":
            chunk, count = arguments
            anyio.run(raw, path, 1, chunk, count, backend=backend)
        case "exporter":
            anyio.run(exporter, path, arguments[0], backend=backend)
        case _:
            anyio.run(importer, path, arguments[0], backend=backend)


if __name__ == "__main__":
    main()
