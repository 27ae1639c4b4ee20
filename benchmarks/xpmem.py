"""The XPMEM plugin between processes, against the same bytes over bare sockets. On one CPU.

The bare side uses non-blocking sockets with `anyio.wait_readable` on the same kind of event loop,
and knows no protocol: what is left is what ours costs.
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

import mmunotify as mn
from mmunotify_xpmem import RDONLY, DeferredXpmemDriver, FileSpace, Partition, StreamEngine
from mmunotify_xpmem.thread_group import ThreadGroup

from ._bench import Row, async_minima, at_least, at_most, undisturbed
from ._xpmem_peer import receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mn.PAGE_SIZE
FAULT = 8 + 2 + 63
"""Bytes of a fault's frame, and of its answer."""
ANSWER = 8 + 2 + 41 + PAGE
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


async def faults_and_reads(backend: str) -> list[Row]:
    """One page at random, and many in order."""
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        stack.enter_context(peer(backend, "raw", where / "raw", FAULT, ANSWER))
        chunk, chunks = BATCH * PAGE, SEQUENTIAL // BATCH
        stack.enter_context(peer(backend, "stream", where / "stream", chunk, chunks))
        segid, _ = stack.enter_context(peer(backend, "exporter", where / "xpmem", SEQUENTIAL))
        bare = ping_pong(stack.enter_context(connected(where / "raw")), FAULT, ANSWER)
        bare_stream = ping_pong(
            stack.enter_context(connected(where / "stream")), 1, SEQUENTIAL * PAGE
        )
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
            many, stream = await async_minima(read, bare_stream, number=1, rounds=15)
    return [
        at_most(f"page fault, {backend}", one / pong, 2, "a bare ping-pong of the same bytes"),
        at_most(f"sequential read, {backend}", many / stream, 2, "a bare stream of the same bytes"),
    ]


async def fan_out(backend: str) -> list[Row]:
    """One page that 16 processes have, and its invalidation."""
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        stack.enter_context(peer(backend, "raw", where / "raw", 80, 80))
        bare = ping_pong(stack.enter_context(connected(where / "raw")), 80, 80)
        async with AsyncExitStack() as astack:
            partition = await astack.enter_async_context(
                Partition(StreamEngine(f"unix:{where / 'xpmem'}"), lease=20.0)
            )
            space = await astack.enter_async_context(FileSpace(size=PAGE))
            group = await partition.open(space.notifiers)
            segid = group.make(space.base, PAGE)
            importers = [
                await anyio.to_thread.run_sync(
                    stack.enter_context, peer(backend, "importer", where / "xpmem", segid)
                )
                for _ in range(FANOUT)
            ]
            best = pong = float("inf")
            for _ in range(40):
                with undisturbed():
                    began = perf_counter_ns()
                    await space.changed()
                    best = min(best, perf_counter_ns() - began)
                    began = perf_counter_ns()
                    await bare(FANOUT)
                    pong = min(pong, perf_counter_ns() - began)
                for _, process in importers:
                    assert process.stdin is not None
                    assert process.stdout is not None
                    process.stdin.write(b"x")
                    process.stdin.flush()
                    await anyio.wait_readable(process.stdout)
                    process.stdout.readline()
            await group.close()
    title = f"one invalidation acknowledged by {FANOUT} processes, {backend}"
    return [at_most(title, best / pong, 1.5, f"{FANOUT} bare ping-pongs")]


async def silent(backend: str) -> list[Row]:
    """Of eight importers one is stopped while it has a page that is invalidated."""
    lease, heartbeat = 0.5, 0.1
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        async with AsyncExitStack() as astack:
            partition = await astack.enter_async_context(
                Partition(StreamEngine(f"unix:{where / 'xpmem'}"), lease=lease, heartbeat=heartbeat)
            )
            space = await astack.enter_async_context(FileSpace(size=PAGE))
            group = await partition.open(space.notifiers)
            segid = group.make(space.base, PAGE)
            importers = [
                await anyio.to_thread.run_sync(
                    stack.enter_context, peer(backend, "importer", where / "xpmem", segid)
                )
                for _ in range(8)
            ]
            importers[0][1].send_signal(signal.SIGSTOP)
            began = perf_counter_ns()
            await space.changed()
            waited = (perf_counter_ns() - began) / 1e9
            await group.close()
    title = f"invalidation with a stopped importer, {backend}"
    return [at_most(title, waited / (lease + 2 * heartbeat), 1, "lease + 2 heartbeats")]


async def coalesced(backend: str) -> list[Row]:
    """10 000 invalidations of pages that one partition has, marked first, or each waited for."""
    with ExitStack() as stack:
        where = stack.enter_context(folder())
        async with AsyncExitStack() as astack:
            enter = astack.enter_async_context
            exporting = await enter(Partition(StreamEngine(f"unix:{where / 'xpmem'}"), 1))
            importing = await enter(Partition(StreamEngine(connect=[f"unix:{where / 'xpmem'}"]), 2))
            space = await enter(FileSpace(size=MANY * PAGE))
            group = ThreadGroup(exporting, None)
            driver = DeferredXpmemDriver.serving(group)
            await space.notifiers.register(driver)
            importer = await importing.open()
            attachment = importer.attach(
                await importer.get(group.make(space.base, space.size), RDONLY)
            )
            ranges = [
                mn.Range(space.base + page * PAGE, space.base + (page + 1) * PAGE)
                for page in range(MANY)
            ]
            together = apart = float("inf")
            for turn in range(5):
                await attachment.read()
                with undisturbed():
                    began = perf_counter_ns()
                    for rng in ranges:
                        driver.invalidate_range(rng)
                    await driver.invalidate_range_sync(ranges[0])
                    together = min(together, perf_counter_ns() - began)
                if turn < 2:
                    await attachment.read()
                    with undisturbed():
                        began = perf_counter_ns()
                        for rng in ranges:
                            driver.invalidate_range(rng)
                            await driver.invalidate_range_sync(rng)
                        apart = min(apart, perf_counter_ns() - began)
            assert exporting.exporter.batches == 2 * MANY + 5
            await importer.close()
    title = f"{MANY} invalidations one by one : coalesced, {backend}"
    return [at_least(title, apart / together, 300, "themselves, each waited for")]


def run() -> list[Row]:
    rows: list[Row] = []
    with one_cpu():
        for measure in (faults_and_reads, fan_out, silent, coalesced):
            for backend in BACKENDS:
                rows += anyio.run(measure, backend, backend=backend)
    return rows
