"""Every installed driver on one address space, and what each of them was told.

The address space is only its `Notifiers` here: whoever owns memory of any kind (a buffer pool, an
object cache, a device heap) announces what happens to it. Drivers are found by their entry points.
Prints what they counted, and writes the log to quickstart.ndjson.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import structlog
from rich import print as rich_print
from rich.table import Table

import mmunotify as mn

LOG = Path("quickstart.ndjson")
HEAP = 0x7F00_0000_0000
PAGES = 512


def pages(first: int, count: int, event: mn.Event) -> mn.Range:
    start = HEAP + first * mn.PAGE_SIZE
    return mn.Range(start, start + count * mn.PAGE_SIZE, event)


async def live_and_die(heap: mn.Notifiers[mn.RwSems]) -> None:
    """What the owner of the heap announces, as Linux does for a process."""
    # fork() write-protects everything; the first write to a page then moves it to a copy.
    await heap.invalidate(pages(0, PAGES, mn.Event.PROTECTION_PAGE))
    for page in range(0, PAGES, 32):
        await heap.invalidate(pages(page, 1, mn.Event.CLEAR))
    # Reclaim asks whether a device still uses the page, and swaps it out if not.
    for page in range(PAGES // 2):
        address = HEAP + page * mn.PAGE_SIZE
        if not heap.clear_flush_young(address, address + mn.PAGE_SIZE):
            await heap.invalidate(pages(page, 1, mn.Event.CLEAR))
    # munmap() of a part: between start and end no driver may translate.
    async with heap.invalidating(pages(128, 64, mn.Event.UNMAP)) as section:
        pass  # here the page table changes
    assert not section.failed
    # exit() tells every driver to drop the rest.
    await heap.release()


async def main() -> None:
    with LOG.open("w") as file:  # noqa: ASYNC230
        structlog.configure(
            processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
            logger_factory=structlog.WriteLoggerFactory(file),
        )
        registry = mn.Registry()
        drivers = {spec.name: registry.create(spec.name) for spec in registry.load_all()}
        heap = mn.Notifiers(name="heap")
        ring = mn.Ring()
        heap.trace = ring.append
        async with AsyncExitStack() as stack:
            for driver in drivers.values():
                await stack.enter_async_context(heap.attached(driver))
            await live_and_die(heap)
        ring.write(file)

    # Counters are no part of the driver contract: another plugin may have none.
    counted = {name: getattr(driver, "counters", {}) for name, driver in drivers.items()}
    table = Table("what a driver was told", *counted)
    for what in sorted(set().union(*counted.values())):
        table.add_row(what, *(str(counters.get(what, "")) for counters in counted.values()))
    rich_print(table)
    print(f"The log, one JSON object a line, is in {LOG}.")


anyio.run(main)
