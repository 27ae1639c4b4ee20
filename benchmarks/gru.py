"""The GRU: instructions that hit and miss, and invalidations with many contexts loaded.

All of it in calls. The memory is that of the model, with contents.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from time import perf_counter_ns
from typing import TYPE_CHECKING

import anyio

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify_gru import Exop, Gru, GruDriver, GruOptions

from ._bench import Row, at_most, bare_calls, printed, undisturbed

if TYPE_CHECKING:
    from mmunotify_gru import Context

PAGE = 4096
GIB = 1 << 30
CALLS = 1000
ROUNDS = 60
NUMBER = 200


class Watch:
    """The shortest time of each step, in ns per iteration; they take turns."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}

    def note(self, name: str, began: int, number: int) -> None:
        taken = (perf_counter_ns() - began) / number
        self.best[name] = min(self.best.get(name, taken), taken)

    def unit(self) -> None:
        began = perf_counter_ns()
        bare_calls(CALLS)
        self.note("call", began, CALLS)

    def calls(self, name: str) -> float:
        return self.best[name] / self.best["call"]


async def instructions() -> list[Row]:
    """Eight elements of 8 bytes: side by side, apart, gathered, and with a miss before."""
    watch = Watch()
    async with Machine(frames=1 << 12, contents=True) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(64 * PAGE)
        await mm.touch(heap, 64 * PAGE, write=True)
        async with Gru().open(mm.notifiers) as context:
            indices = b"".join((64 * at).to_bytes(8, "little") for at in range(8))
            await context.put(1024, indices)
            with undisturbed():
                for _ in range(ROUNDS):
                    await _hits(watch, context, heap)
                    await _misses(watch, context, heap)
                    watch.unit()
    hit = watch.calls("vload")
    return [
        at_most("VLOAD of 8 elements, TLB hit", hit, 120, "a call", "calls"),
        at_most("VSTORE of 8 elements, TLB hit", watch.calls("vstore"), 120, "a call", "calls"),
        at_most("miss and drop-in", watch.calls("miss") - hit, 400, "a call", "calls"),
        printed("IVLOAD of 8 elements, TLB hit", watch.calls("ivload"), "a call", "calls"),
        printed("GAMER add, TLB hit", watch.calls("gamer"), "a call", "calls"),
    ]


async def _hits(watch: Watch, context: Context, heap: int) -> None:
    await context.vset(heap, 1, elements=8)
    began = perf_counter_ns()
    for _ in range(NUMBER):
        await context.vload(heap, elements=8)
    watch.note("vload", began, NUMBER)
    began = perf_counter_ns()
    for _ in range(NUMBER):
        await context.vstore(heap, elements=8)
    watch.note("vstore", began, NUMBER)
    began = perf_counter_ns()
    for _ in range(NUMBER):
        await context.ivload(heap, 0, 1024, elements=8)
    watch.note("ivload", began, NUMBER)
    began = perf_counter_ns()
    for _ in range(NUMBER):
        await context.gamer(Exop.ADD, heap, 1)
    watch.note("gamer", began, NUMBER)


async def _misses(watch: Watch, context: Context, heap: int) -> None:
    context.flush_tlb(heap, heap + 64 * PAGE)
    began = perf_counter_ns()
    for page in range(64):
        await context.vload(heap + page * PAGE, elements=8)
    watch.note("miss", began, 64)


async def invalidations() -> list[Row]:
    """64 contexts of one address space on four chiplets whose TLBs have translations of it."""
    watch = Watch()
    async with Machine(frames=1 << 12) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(2 * GIB + 64 * PAGE)
        await mm.touch(heap, 64 * PAGE, write=True)
        gru = Gru(blades=2)
        async with AsyncExitStack() as stack:
            contexts = [
                await stack.enter_async_context(
                    gru.open(mm.notifiers, dseg=1024, blade=number // 32)
                )
                for number in range(64)
            ]
            for context in contexts:
                await context.nop()
            assert sum(state.active for state in gru.states) == 64
            driver = gru.drivers[0]
            page = mn.Range(heap, heap + PAGE)
            empty = mn.Range(heap + 63 * PAGE, heap + 64 * PAGE)
            large = mn.Range(heap, heap + 2 * GIB)

            async def fill() -> None:
                for number in (0, 1, 32, 33):
                    await contexts[number].vflush(heap, elements=32, stride=64)

            with undisturbed():
                for _ in range(ROUNDS):
                    for name, rng in (("1 page", page), ("no page", empty), ("2 GiB", large)):
                        await fill()
                        began = perf_counter_ns()
                        driver.invalidate_range_start(rng)
                        driver.invalidate_range_end(rng)
                        watch.note(name, began, 1)
                    watch.unit()
    page_calls = watch.calls("1 page")
    return [
        at_most("invalidate of 1 page, 64 contexts", page_calls, 1200, "a call", "calls"),
        at_most("invalidate of 2 GiB, 64 contexts", watch.calls("2 GiB"), 2400, "a call", "calls"),
        at_most("the same", watch.calls("2 GiB") / page_calls, 2, "that of 1 page"),
        printed("invalidate of 1 page that nobody has", watch.calls("no page"), "a call", "calls"),
    ]


async def device() -> list[Row]:
    """What a replay does: accesses that hit, and invalidations of what is not loaded."""
    watch = Watch()
    async with Machine(frames=1 << 12) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(64 * PAGE)
        await mm.touch(heap, 64 * PAGE, write=True)
        driver = GruDriver(GruOptions(contexts=2))
        async with mm.attached(driver):
            for _ in range(4):
                if not driver.access(heap):
                    await driver.fault(heap)
            elsewhere = mn.Range(heap + PAGE, heap + 2 * PAGE)
            with undisturbed():
                for _ in range(ROUNDS):
                    began = perf_counter_ns()
                    for _ in range(NUMBER):
                        driver.access(heap)
                    watch.note("access", began, NUMBER)
                    began = perf_counter_ns()
                    for _ in range(NUMBER):
                        driver.invalidate_range_start(elsewhere)
                        driver.invalidate_range_end(elsewhere)
                    watch.note("elsewhere", began, NUMBER)
                    watch.unit()
    return [
        printed("access of a device, TLB hit", watch.calls("access"), "a call", "calls"),
        printed("invalidate of a page not loaded", watch.calls("elsewhere"), "a call", "calls"),
    ]


def run() -> list[Row]:
    return [row for part in (instructions, invalidations, device) for row in anyio.run(part)]
