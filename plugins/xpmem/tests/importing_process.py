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

from mmunotify_xpmem import RDWR, ExporterGone, FencedError, Partition, StreamEngine
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


async def look(
    attachment: Attachment, published: memoryview, dice: random.Random, pages: int
) -> None:
    """Read some pages: each is of one version, and of none that is older than was due before."""
    first = dice.randrange(pages)
    count = 1 if dice.random() < 0.8 else dice.randint(1, pages - first)
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
    async with Partition(StreamEngine(connect=[address]), patience=20.0) as xpmem:
        group = await xpmem.open()
        attachment = group.attach(await group.get(segid, RDWR))
        for number in range(1 << 62):
            try:
                if number % 16 == 15:
                    await store(attachment, (pages + slot) * PAGE, number)
                await look(attachment, published, dice, pages)
            except ExporterGone:
                return
            published[pages + slot] += 1
            # Most reads are hits: let invalidations in.
            await anyio.sleep(0.0005)


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
