"""The XPMEM plugin between processes, against the same bytes over bare sockets. On one CPU.

The bare side is what one would write at first for the same bytes: `anyio.wait_readable` and
`recv_into` for each message, then `send`, over non-blocking Unix sockets on the same kind of event
loop. It knows no protocol: what is left is what ours costs.

    ping-pong   a message of as many bytes as ours, and the answer, between two processes
    stream      a byte, then all the memory in pieces of a batch, received where it is wanted
    n of them   with n processes, as ours are, one after the other: each is over before the next

Its sockets are as the system makes them. All importers have a process of their own. Printed besides
is what a bare stream costs whose sockets have buffers as long as ours, and a bare fan-out that
sends to all before it waits for the first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

import mmunotify as mn
from mmunotify_xpmem import RDONLY, DeferredXpmemDriver, FileSpace, Partition, StreamEngine
from mmunotify_xpmem.stream_engine import SOCKET_BUFFER
from mmunotify_xpmem.thread_group import ThreadGroup
from mmunotify_xpmem.wire import Ack, Fault, Inv, Page, encode

from ._bench import Row, async_minima, at_least, at_most, printed, undisturbed
from ._xpmem_peer import receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mn.PAGE_SIZE
ID = bytes(16)
FRAME = 8
"""Bytes that the engine puts before a message."""
FAULT = FRAME + len(encode(Fault(30_000, ID, ID, ID, 70_000, 2_000, 1, 1)))
ANSWER = FRAME + len(encode(Page(ID, ID, 70_000))) + PAGE
INVALIDATION = FRAME + len(encode(Inv(ID, [(ID, 1, 1, [0, 1])])))
ACKNOWLEDGEMENT = FRAME + len(encode(Ack(30_000, ID, ID, [(ID, 1)])))
SEQUENTIAL = 2048
BATCH = 64
FANOUT = 16
MANY = 10_000
BACKENDS = ("asyncio", "trio")


@contextmanager
def one_cpu() -> Iterator[None]:
    """This process and its children on one CPU: what is measured is the sum of the work."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def peer(backend: str, *words: object) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Another process, and the first line that it says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks._xpmem_peer", backend, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().decode().strip(), process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.setblocking(False)
        yield sock


def ping_pong(sock: socket.socket, request: int, reply: int) -> Any:
    asked, answered = memoryview(bytes(request)), memoryview(bytearray(reply))

    async def run(number: int) -> None:
        for _ in range(number):
            await send(sock, asked)
            await anyio.wait_readable(sock)
            await receive(sock, answered)

    return run


def bare_peer(
    stack: ExitStack,
    backend: str,
    path: Path,
    request: int,
    reply: int,
    chunk: int,
    buffer: int = 0,
) -> socket.socket:
    """A process that answers without a protocol, and the connection to it."""
    stack.enter_context(peer(backend, "raw", path, request, reply, chunk, buffer))
    return stack.enter_context(connected(path))


async def importing(
    stack: ExitStack, backend: str, role: str, path: Path, segid: int, size: int
) -> subprocess.Popen[bytes]:
    """A process that imports, and has faulted everything in."""
    _, process = await anyio.to_thread.run_sync(
        stack.enter_context, peer(backend, role, path, segid, size)
    )
    return process


async def faulted_again(process: subprocess.Popen[bytes]) -> None:
    """Have an importer read everything once more."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x")
    process.stdin.flush()
    await anyio.wait_readable(process.stdout)
    process.stdout.readline()


async def faults_and_reads(backend: str) -> list[Row]:
    """One page at random, and many in order."""
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        size = SEQUENTIAL * PAGE
        bare = ping_pong(
            bare_peer(stack, backend, where / "raw", FAULT, ANSWER, ANSWER), FAULT, ANSWER
        )
        bare_stream = ping_pong(
            bare_peer(stack, backend, where / "stream", 1, size, BATCH * PAGE), 1, size
        )
        buffered = ping_pong(
            bare_peer(stack, backend, where / "buffered", 1, size, BATCH * PAGE, SOCKET_BUFFER),
            1,
            size,
        )
        segid, _ = stack.enter_context(peer(backend, "exporter", where / "xpmem", SEQUENTIAL))
        engine = StreamEngine(connect=[f"unix:{where / 'xpmem'}"])
        async with Partition(engine) as partition:
            group = await partition.open()
            apid = await group.get(int(segid), RDONLY)
            attachment = group.attach(apid)
            permit: Any = group.permits[apid]
            drop = permit.grant.drop_all

            async def fault(number: int) -> None:
                for page in range(0, 2 * number, 2):
                    await attachment.read(page * PAGE, 8)
                drop()

            memory = bytearray(attachment.size)

            async def read(number: int) -> None:
                for _ in range(number):
                    await attachment.read_into(memory)
                    drop()

            one, pong = await async_minima(fault, bare, number=300, rounds=12)
            many, stream, longer = await async_minima(
                read, bare_stream, buffered, number=1, rounds=15
            )
    return [
        at_most(f"page fault, {backend}", one / pong, 2, "a bare ping-pong of the same bytes"),
        at_most(f"sequential read, {backend}", many / stream, 2, "a bare stream of the same bytes"),
        printed(f"sequential read, {backend}", many / longer, "the same with our socket buffers"),
    ]


async def fan_out(backend: str) -> list[Row]:
    """One page that 16 processes have, and its invalidation."""
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        there, back = INVALIDATION, ACKNOWLEDGEMENT
        socks = [
            bare_peer(stack, backend, where / f"raw{number}", there, back, back)
            for number in range(FANOUT)
        ]
        bare = [ping_pong(sock, there, back) for sock in socks]
        message, answer = memoryview(bytes(there)), memoryview(bytearray(back))
        async with AsyncExitStack() as astack:
            partition = await astack.enter_async_context(
                Partition(StreamEngine(f"unix:{where / 'xpmem'}"), lease=20.0)
            )
            space = await astack.enter_async_context(FileSpace(size=PAGE))
            group = await partition.open(space.notifiers)
            segid = group.make(space.base, PAGE)
            importers = [
                await importing(stack, backend, "importer", where / "xpmem", segid, 1)
                for _ in range(FANOUT)
            ]
            best = pongs = together = float("inf")
            for _ in range(40):
                with undisturbed():
                    began = perf_counter_ns()
                    await space.changed()
                    best = min(best, perf_counter_ns() - began)
                    began = perf_counter_ns()
                    for ping in bare:
                        await ping(1)
                    pongs = min(pongs, perf_counter_ns() - began)
                    began = perf_counter_ns()
                    for sock in socks:
                        await send(sock, message)
                    for sock in socks:
                        await anyio.wait_readable(sock)
                        await receive(sock, answer)
                    together = min(together, perf_counter_ns() - began)
                for process in importers:
                    await faulted_again(process)
            await group.close()
    title = f"one invalidation acknowledged by {FANOUT} processes, {backend}"
    return [
        at_most(title, best / pongs, 1.5, f"{FANOUT} bare ping-pongs with {FANOUT} processes"),
        printed(title, best / together, "the same, all sent before the first is waited for"),
    ]


async def silent(backend: str) -> list[Row]:
    """Eight importers read as fast as they can what is invalidated all the time; one is stopped."""
    lease, heartbeat, pages = 0.5, 0.1, 16
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        async with AsyncExitStack() as astack:
            partition = await astack.enter_async_context(
                Partition(StreamEngine(f"unix:{where / 'xpmem'}"), lease=lease, heartbeat=heartbeat)
            )
            space = await astack.enter_async_context(FileSpace(size=pages * PAGE))
            group = await partition.open(space.notifiers)
            segid = group.make(space.base, pages * PAGE)
            importers = [
                await importing(stack, backend, "busy", where / "xpmem", segid, pages * PAGE)
                for _ in range(8)
            ]
            worst = 0.0
            async with anyio.create_task_group() as tasks:

                async def invalidate(page: int) -> None:
                    nonlocal worst
                    while True:
                        began = perf_counter_ns()
                        await space.changed(page * PAGE, (page + 1) * PAGE)
                        worst = max(worst, (perf_counter_ns() - began) / 1e9)
                        await anyio.lowlevel.checkpoint()

                for page in range(pages):
                    tasks.start_soon(invalidate, page)
                await anyio.sleep(lease)
                importers[0].send_signal(signal.SIGSTOP)
                await anyio.sleep(3 * lease)
                tasks.cancel_scope.cancel()
            assert len(partition.exporter.sharers) == 7, "the one that is stopped, and no other"
            await group.close()
    title = f"invalidation under load with a stopped importer, {backend}"
    return [at_most(title, worst / (lease + 2 * heartbeat), 1, "lease + 2 heartbeats")]


async def coalesced(backend: str) -> list[Row]:
    """10 000 invalidations of pages that one partition has, marked first, or each waited for."""
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        async with AsyncExitStack() as astack:
            partition = await astack.enter_async_context(
                Partition(StreamEngine(f"unix:{where / 'xpmem'}"))
            )
            space = await astack.enter_async_context(FileSpace(size=MANY * PAGE))
            group = ThreadGroup(partition, None)
            driver = DeferredXpmemDriver.serving(group)
            await space.notifiers.register(driver)
            segid = group.make(space.base, space.size)
            importer = await importing(
                stack, backend, "importer", where / "xpmem", segid, space.size
            )
            ranges = [
                mn.Range(space.base + page * PAGE, space.base + (page + 1) * PAGE)
                for page in range(MANY)
            ]
            together = apart = float("inf")
            for turn in range(8):
                with undisturbed():
                    began = perf_counter_ns()
                    for rng in ranges:
                        driver.invalidate_range(rng)
                    await driver.invalidate_range_sync(ranges[0])
                    together = min(together, perf_counter_ns() - began)
                await faulted_again(importer)
                if turn < 3:
                    with undisturbed():
                        began = perf_counter_ns()
                        for rng in ranges:
                            driver.invalidate_range(rng)
                            await driver.invalidate_range_sync(rng)
                        apart = min(apart, perf_counter_ns() - began)
                    await faulted_again(importer)
            assert partition.exporter.batches == 3 * MANY + 8
    title = f"{MANY} invalidations one by one : coalesced, {backend}"
    return [at_least(title, apart / together, 300, "themselves, each waited for")]


def run() -> list[Row]:
    rows: list[Row] = []
    with one_cpu():
        for measure in (faults_and_reads, fan_out, silent, coalesced):
            for backend in BACKENDS:
                rows += anyio.run(measure, backend, backend=backend)
    return rows
