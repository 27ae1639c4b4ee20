"""Pins are balanced: a page stays pinned while somebody has it, and not for longer.

What could leave a pin behind is a fault that nobody waits for any more once its page is pinned, or
one that ends in an error half way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify import BadAddress, RwSems, SpinLocks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    World = Callable[[], AbstractAsyncContextManager[Any]]

PAGE = 4096
pinned = pytest.mark.parametrize(
    "world",
    [(SpinLocks, False, True), (RwSems, True, True)],
    ids=["spin-within", "rwsem-across"],
    indirect=True,
)


class Slow:
    """An address space in which looking a page up takes as long as a test wants."""

    def __init__(self, primary: Any) -> None:
        self.primary = primary
        self.asked = anyio.Event()
        self.go_on = anyio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.primary, name)

    async def pin(self, start: int, end: int, *, write: bool = True) -> Any:
        self.asked.set()
        await self.go_on.wait()
        return await self.primary.pin(start, end, write=write)


@pinned
@pytest.mark.parametrize("what", ["release", "remove", "close"])
async def test_nobody_waits_for_the_page(world: World, what: str) -> None:
    """While a page is faulted in the importer gives its permit back, or the exporter withdraws the
    segment or leaves: the fault fails, and the page does not stay pinned."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        apid = await importer.get(exported.segid)
        attachment = importer.attach(apid)
        slow = Slow(exported.mm.primary)
        exported.group.enter(slow)

        async def read() -> None:
            with pytest.raises(BadAddress):
                await attachment.read(0, 1)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await slow.asked.wait()
                if what == "release":
                    tasks.start_soon(importer.release, apid)
                elif what == "remove":
                    tasks.start_soon(exported.group.remove, exported.segid)
                else:
                    tasks.start_soon(exported.group.close)
                await anyio.wait_all_tasks_blocked()
                slow.go_on.set()
            await anyio.wait_all_tasks_blocked()
        assert not exported.group.table.holders
        assert not exported.group.table.pins
        assert exported.pinned == 0


@pinned
async def test_hole_behind_pinned_pages(world: World) -> None:
    """Pages before a hole were faulted in for nothing: they are not held on to."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        await exported.mm.munmap(exported.address + 2 * PAGE, PAGE)
        importer = await w.open()
        apid = await importer.get(exported.segid)
        with pytest.raises(BadAddress):
            await importer.attach(apid).read()
        assert exported.pinned == len(exported.group.table.holders)
        await importer.release(apid)
        assert exported.pinned == 0
