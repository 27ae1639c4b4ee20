"""An importer for the tests of real processes: reads pages at random until it is killed.

The exporter publishes in a file, for each page, the version that every reader must see from now on.
What is read after that, and is older, is stale: then this ends with status 3.
"""

from __future__ import annotations

import mmap
import os
import random
import sys

import anyio

from mmunotify_xpmem import RDONLY, ExporterGone, Partition, StreamEngine

PAGE = 4096
STALE = 3


def opened(oracle: str) -> memoryview:
    with open(oracle, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")


async def main(address: str, segid: int, oracle: str, pages: int, slot: int) -> None:
    published = opened(oracle)
    dice = random.Random(os.getpid())
    async with Partition(StreamEngine(connect=[address]), lease=5.0, patience=20.0) as xpmem:
        group = await xpmem.open()
        attachment = group.attach(await group.get(segid, RDONLY))
        while True:
            page = dice.randrange(pages)
            due = published[page]
            try:
                data = await attachment.read(page * PAGE, 8)
            except ExporterGone:
                return
            if int.from_bytes(data, "little") < due:
                print(f"page {page}: {int.from_bytes(data, 'little')}, due is {due}", flush=True)
                os._exit(STALE)
            published[pages + slot] += 1
            # Most reads are hits: let invalidations in.
            await anyio.sleep(0.0005)


if __name__ == "__main__":
    arguments = sys.argv[2:]
    anyio.run(
        main, arguments[0], int(arguments[1]), arguments[2], int(arguments[3]), int(arguments[4]),
        backend=sys.argv[1],
    )  # fmt: skip
