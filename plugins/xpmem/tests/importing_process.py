"""An importer for the tests of real processes: reads pages at random until it is killed.

The exporter publishes in a file, for each page, the version that every reader must see from now on.
What is read after that, and is older, is stale: then this ends with status 3. Now and then it
stores to a page of its own, and must find there what it has stored.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys
from typing import TYPE_CHECKING, Any

import anyio

from mmunotify_xpmem import RDWR, FencedError, Partition, StreamEngine
from mmunotify_xpmem.importer import Importer

if TYPE_CHECKING:
    from mmunotify_xpmem import Attachment

PAGE = 4096
STALE = 3
WORDS = struct.Struct("<512Q")


def opened(oracle: str) -> memoryview:
    with open(oracle, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")


def stale(what: str) -> None:
    print(what, flush=True)
    os._exit(STALE)


async def look(attachment: Attachment, published: memoryview, first: int, count: int) -> None:
    """Read some pages: each is of one version, and of none that is older than was due before."""
    due = published[first : first + count].tolist()
    data = await attachment.read(first * PAGE, count * PAGE)
    for page, (wanted, words) in enumerate(zip(due, WORDS.iter_unpack(data), strict=True), first):
        if min(words) < wanted or len(set(words)) > 1:
            stale(f"page {page}: {min(words)} to {max(words)}, due is {wanted}")


async def store(attachment: Attachment, at: int, number: int) -> None:
    """Store, and load it again: it is there, unless a successor has stored over it."""
    try:
        await attachment.write(at, struct.pack("<QQ", os.getpid(), number))
    except FencedError:
        return
    who, found = struct.unpack("<QQ", await attachment.read(at, 16))
    if who == os.getpid() and found < number:
        stale(f"the store of {number} is lost: {found}")


async def main(address: str, segid: int, oracle: str, pages: int, slot: int) -> None:
    published = opened(oracle)
    dice = random.Random(os.getpid())

    async def watch(page: int) -> None:
        """Most reads are hits: let invalidations in."""
        while True:
            await look(attachment, published, page, 1)
            published[pages + slot] += 1
            await anyio.sleep(dice.uniform(0.01, 0.1))

    async with Partition(StreamEngine(connect=[address]), patience=300.0) as xpmem:
        group = await xpmem.open()
        attachment = group.attach(await group.get(segid, RDWR))
        async with anyio.create_task_group() as tasks:
            # One for each page: who has to wait for a page does not keep others from theirs.
            for page in range(pages):
                tasks.start_soon(watch, page)
            for number in range(1 << 62):
                await store(attachment, (pages + slot) * PAGE, number)
                first = dice.randrange(pages)
                await look(attachment, published, first, dice.randint(1, pages - first))
                await anyio.sleep(dice.uniform(0.02, 0.1))


class Deaf(Importer):
    """Acknowledges invalidations, and keeps the pages."""

    def _invalidate(self, *args: Any) -> None: ...


class Trusting(Importer):
    """Holds its lease for endless."""

    def _extend(self, grant: Any, sent: float) -> None:
        grant.lease_until = float("inf")


def broken(name: str) -> None:
    """Have importers of this process break the protocol."""
    for kind in (Deaf, Trusting):
        if kind.__name__ == name:
            for method, function in vars(kind).items():
                if method.startswith("_") and not method.startswith("__"):
                    setattr(Importer, method, function)


if __name__ == "__main__":
    backend, mutant, *arguments = sys.argv[1:]
    broken(mutant)
    anyio.run(
        main, arguments[0], int(arguments[1]), arguments[2], int(arguments[3]), int(arguments[4]),
        backend=backend,
    )  # fmt: skip
