"""Bugs that KVM has had, each as a check that this machine passes and a mutant of it does not.

A mutant is the machine with one rule broken; the same check has to see it. Orders of events that
only a scheduler can bring about are explored.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from dict_mm import DictMm
from mmunotify.errors import ExplorationFailed
from mmunotify.locks import lockdep
from mmunotify.testing.explore import PCT, explore
from mmunotify_kvm import faults, notifier
from mmunotify_kvm.errors import MmioExit
from mmunotify_kvm.faults import FaultResult, page_fault
from mmunotify_kvm.memslots import INVALID
from mmunotify_kvm.mmu import Mmu
from mmunotify_kvm.pfn_cache import GfnToPfnCache
from mmunotify_kvm.vm import VirtualMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from mmunotify_kvm.memslots import MemorySlot
    from mmunotify_kvm.vcpu import VCpu

    Scenario = Callable[[], Coroutine[Any, Any, Any]]

PAGE = mn.PAGE_SIZE
BASE = 1 << 30


@pytest.fixture(autouse=True)
def _plain_locks() -> Iterator[None]:
    """Without lockdep, which is an order of magnitude slower."""
    with lockdep.checking(False):
        yield


def failure(scenario: Scenario, **options: Any) -> str:
    """How the exploration of a mutant fails."""
    with pytest.raises(ExplorationFailed) as failed:
        explore(scenario, strategy=PCT(depth=4), schedules=3_000, stall=500, **options).check()
    return str(failed.value)


class SlowLookups(VirtualMachine):
    """Whose lookups take time: before the page is looked up, and before the answer is used."""

    def lookup_nowait(self, address: int) -> mn.Translation | None:
        return None

    async def lookup(self, address: int, write: bool) -> mn.Translation:
        await checkpoint()
        found = await super().lookup(address, write)
        await checkpoint()
        return found


class Slow(mn.SleepableDriver):
    """Another driver, at whose side every section takes time."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await checkpoint()


async def started(vm: VirtualMachine, pages: int = 2) -> DictMm:
    """A process with some memory, all of it a guest's, and a slow driver beside the machine."""
    mm = DictMm()
    await mm.map(BASE, BASE + pages * PAGE)
    await mm.notifiers.register(Slow())
    await mm.notifiers.register(vm)
    await vm.set_user_memory_region(0, 0, pages * PAGE, BASE)
    return mm


async def finished(mm: DictMm, vm: VirtualMachine) -> None:
    """Counts are balanced, nobody is left behind, and the process exits with nothing mapped."""
    assert (vm.active, vm.mmu.invalidate_in_progress) == (0, 0), (
        "I-PAIR: a section is still counted"
    )
    assert vm.srcu.readers == 0
    await mm.put()
    assert vm.pages_4k == 0
    assert mm.frames.used == 0, "I-FREE: a frame is leaked"


# The retry protocol, and Z44: the test outside of mmu_lock ----------------------------------------


def guest_and_host(kind: Callable[[], VirtualMachine], guests: int = 1) -> Scenario:
    """Guests write and read while their host takes the page: none uses what it had before."""

    async def writes_while_the_host_evicts() -> None:
        vm = kind()
        mm = await started(vm)

        async def guest(number: int) -> None:
            for value in (b"\1", b"\2"):
                await vm.vcpus[0].store(number, value)
                await checkpoint()
                assert await vm.vcpus[0].load(number) == value, "I-DIRTY: a write is lost"

        async def host() -> None:
            await mm.evict(BASE)

        async with anyio.create_task_group() as tasks:
            for number in range(guests):
                tasks.start_soon(guest, number, name=f"guest {number}")
            tasks.start_soon(host, name="host")
        assert await mm.load(BASE, guests) == b"\2" * guests
        await finished(mm, vm)

    return writes_while_the_host_evicts


class CheckBeforeLock(SlowLookups):
    """Z44: asks whether to retry, and only then waits for mmu_lock and maps."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: tuple[int, bool] | None = None

    async def lookup(self, address: int, write: bool) -> mn.Translation:
        mmu = self.mmu
        while True:
            seq = mmu.invalidate_seq
            found = await super().lookup(address, write)
            if not Mmu.retry(mmu, seq, address - BASE >> mn.PAGE_SHIFT):
                break
        await checkpoint()  # somebody else holds mmu_lock
        return found


class NeverRetries(Mmu):
    __slots__ = ()

    def retry(self, seq: int, gfn: int) -> bool:
        return False


class IgnoresOpenSections(Mmu):
    __slots__ = ()

    def retry(self, seq: int, gfn: int) -> bool:
        return self.invalidate_seq != seq


class IgnoresSectionsThatAreOver(Mmu):
    __slots__ = ()

    def retry(self, seq: int, gfn: int) -> bool:
        return self.invalidate_in_progress > 0 and self.range_start <= gfn < self.range_end


class LateSnapshot(SlowLookups):
    """Takes note of the sequence when the lookup is over."""

    async def lookup(self, address: int, write: bool) -> mn.Translation:
        found = await super().lookup(address, write)
        self.noted = self.mmu.invalidate_seq
        return found


class RetryOfLateSnapshot(Mmu):
    __slots__ = ()

    def retry(self, seq: int, gfn: int) -> bool:
        return super().retry(self.invalidate_seq, gfn)


class KeepsTlbs(Mmu):
    __slots__ = ()

    def flush(self, first: int, last: int) -> None:
        """Leaves the TLBs as they are."""


class OneTooFew(SlowLookups):
    """Invalidates [start, end - 1 page)."""

    def zap(self, slot: Any, first: int, last: int) -> int:
        return super().zap(slot, first, last - 1)


def test_retry_protocol() -> None:
    """Under every schedule the guest's own writes are what it reads."""
    found = explore(guest_and_host(SlowLookups)).check()
    assert found.exhausted


@pytest.mark.parametrize("schedules", [300, pytest.param(5_000, marks=pytest.mark.long)])
def test_retry_protocol_with_more_guests(schedules: int) -> None:
    """The same for guests that fault at the same page."""
    explore(guest_and_host(SlowLookups, 3), strategy=PCT(depth=4), schedules=schedules).check()


@pytest.mark.parametrize(
    ("machine", "mmu"),
    [
        pytest.param(CheckBeforeLock, NeverRetries, id="Z44"),
        (SlowLookups, NeverRetries),
        (SlowLookups, IgnoresOpenSections),
        (SlowLookups, IgnoresSectionsThatAreOver),
        (LateSnapshot, RetryOfLateSnapshot),
        (SlowLookups, KeepsTlbs),
        (OneTooFew, Mmu),
    ],
)
def test_mutants_of_the_retry_protocol(
    monkeypatch: pytest.MonkeyPatch, machine: type[VirtualMachine], mmu: type[Mmu]
) -> None:
    """Without one of its rules some schedule has the guest use a page that is not its own."""
    monkeypatch.setattr(notifier, "Mmu", mmu)
    assert "StaleTranslation" in failure(guest_and_host(machine))


# Z4: a section that another driver refuses has a start, and must have its end ---------------------


class Refuses(mn.SleepableDriver):
    """Would have to wait, which the OOM reaper must not."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        pass


class NoEndOfRefused(VirtualMachine):
    """Z4: is told no end of a non-blockable section, as when the core forgot who had succeeded."""

    def invalidate_range_end(self, rng: mn.Range) -> None:
        if rng.blockable:
            super().invalidate_range_end(rng)


async def refused_section(kind: type[VirtualMachine]) -> None:
    """Refused after the machine was told its start: the guest goes on as if nothing had been."""
    vm = kind()
    mm = DictMm()
    await mm.map(BASE, BASE + PAGE)
    await mm.notifiers.register(Refuses())  # told after the machine: the newest comes first
    await mm.notifiers.register(vm)
    await vm.set_user_memory_region(0, 0, PAGE, BASE)
    await vm.vcpus[0].store(0, b"\1")
    section = mm.notifiers.invalidating_nonblock(mn.Range(BASE, BASE + PAGE))
    with pytest.raises(mn.WouldBlock), section:
        pytest.fail("the section was not refused")
    assert vm.pages_4k == 0, "the machine was not told"
    assert await page_fault(vm, vm.vcpus[0], 0) is FaultResult.FIXED, (
        "I-PROG: faults retry for ever"
    )
    await finished(mm, vm)


async def test_z4() -> None:
    """Every successful start has its end."""
    await refused_section(VirtualMachine)


async def test_z4_mutant() -> None:
    """A missing end is a guest that makes no progress."""
    with pytest.raises(AssertionError, match="I-PROG: faults retry for ever"):
        await refused_section(NoEndOfRefused)


# Z38, Z39: memslots and sections ------------------------------------------------------------------


def slots_and_sections(
    kind: Callable[[], VirtualMachine], wrap: Callable[[Any], mn.AnyDriver] = lambda vm: vm
) -> Scenario:
    """Memslots go and come while sections are open: each section meets the same ones twice."""

    async def changes_slots_while_the_host_unmaps() -> None:
        vm = kind()
        mm = DictMm()
        await mm.map(BASE, BASE + 2 * PAGE)
        await mm.notifiers.register(Slow())
        await mm.notifiers.register(wrap(vm))
        await vm.set_user_memory_region(0, 0, PAGE, BASE)

        async def update() -> None:
            await vm.set_user_memory_region(0, 0, 0)
            await vm.set_user_memory_region(1, PAGE, PAGE, BASE + PAGE)

        async def host(number: int) -> None:
            await mm.evict(BASE + number * PAGE)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(update, name="update")
            for number in range(2):
                tasks.start_soon(host, number, name=f"host {number}")
        await finished(mm, vm)

    return changes_slots_while_the_host_unmaps


class SwapsAtOnce(VirtualMachine):
    """Z38: swaps memslots while sections are open."""

    async def sections_over(self) -> None:
        pass


class TakesSlotsLock(mn.SleepableDriver):
    """Z39: a machine whose callbacks take slots_lock."""

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm

    def attach(self, primary: mn.Primary | None) -> None:
        self.vm.attach(primary)

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        self.vm.active += 1
        async with self.vm.slots_lock.reading():
            self.vm.active -= 1
            self.vm.invalidate_range_start(rng)

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        self.vm.invalidate_range_end(rng)

    async def release(self) -> None:
        await self.vm.release()


def test_z38_z39() -> None:
    """A swap waits for open sections, and no section waits for a swap."""
    explore(slots_and_sections(VirtualMachine), schedules=1_000).check()


def test_z38_mutant() -> None:
    """A swap between start and end leaves a section counted, or one that was never begun."""
    assert "I-PAIR" in failure(slots_and_sections(SwapsAtOnce))


def test_z39_mutant() -> None:
    """The updater waits for the section, and the section for the updater."""
    assert "Deadlock" in failure(slots_and_sections(VirtualMachine, TakesSlotsLock))


# Z40: gfn-to-pfn caches ---------------------------------------------------------------------------


def cache_and_host(
    cache_kind: type[GfnToPfnCache], kind: Callable[[], VirtualMachine] = SlowLookups
) -> Scenario:
    """The hypervisor uses a cached page while its host takes it away."""

    async def uses_a_cached_page() -> None:
        vm = kind()
        mm = await started(vm)
        with cache_kind(vm, 0) as cache:

            async def hypervisor() -> None:
                for value in (b"\1", b"\2"):
                    while not cache.check():
                        await cache.refresh()
                    cache.write(0, value)
                    await checkpoint()
                    if cache.check():
                        assert cache.read(0, 1) in {b"\1", b"\2"}

            async def host() -> None:
                await mm.evict(BASE)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hypervisor, name="hypervisor")
                tasks.start_soon(host, name="host")
        assert await mm.load(BASE, 1) == b"\2"
        await finished(mm, vm)

    return uses_a_cached_page


class AsksForTheSequenceOnly(GfnToPfnCache):
    """Z40: a section that is open when the refresh begins, and when it ends, is not seen."""

    def overtaken(self, seq: int) -> bool:
        return self.vm.mmu.invalidate_seq != seq


class AsksForOpenSectionsOnly(GfnToPfnCache):
    """Z40: a section that is over when the refresh ends is not seen."""

    def overtaken(self, seq: int) -> bool:
        return self.vm.active > 0


class AsksBeforeTheLock(GfnToPfnCache):
    """Z40: what was looked up is used after the lock was let go and taken again."""

    async def _refresh(self) -> None:
        await super()._refresh()
        found, self.valid = self._found, False
        await checkpoint()
        self._found, self.valid = found, True


def test_z40() -> None:
    """A refresh that an invalidation overtakes begins again."""
    explore(cache_and_host(GfnToPfnCache), schedules=4_000).check()


@pytest.mark.parametrize(
    "mutant", [AsksForTheSequenceOnly, AsksForOpenSectionsOnly, AsksBeforeTheLock]
)
def test_z40_mutants(mutant: type[GfnToPfnCache]) -> None:
    """Half of the question, or the whole of it too early, makes a page valid that has gone."""
    assert "StaleTranslation" in failure(cache_and_host(mutant))


# Z41: faults on a slot that is on its way out -----------------------------------------------------


def guest_and_move(kind: Callable[[], VirtualMachine] = SlowLookups) -> Scenario:
    """A slot moves by a page: of a gfn that it has before and after, the guest sees memory."""

    async def watches_a_slot_that_moves() -> None:
        vm = kind()
        mm = await started(vm)
        await mm.store(BASE, b"\1")
        await mm.store(BASE + PAGE, b"\2")
        moved = False

        async def guest(vcpu: VCpu) -> None:
            for _ in range(2):
                before = moved
                try:
                    found = await vcpu.load(PAGE)
                except MmioExit:
                    raise AssertionError("memory of the guest was taken for a device") from None
                assert found in ({b"\1"} if before else {b"\2", b"\1"}), "read by the old pfn"
                await checkpoint()

        async def host() -> None:
            await mm.evict(BASE + PAGE)

        async def update() -> None:
            nonlocal moved
            await vm.set_user_memory_region(0, PAGE, 2 * PAGE, BASE)
            moved = True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guest, vm.vcpus[0], name="guest")
            tasks.start_soon(guest, vm.vcpus[0], name="its other task")
            tasks.start_soon(host, name="host")
            tasks.start_soon(update, name="update")
        assert await vm.vcpus[0].load(PAGE) == b"\1"
        await finished(mm, vm)

    return watches_a_slot_that_moves


def test_z41() -> None:
    """A fault on a slot that is on its way out waits for what comes after it."""
    explore(guest_and_move(), strategy=PCT(depth=4), schedules=500).check()


def test_z41_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for a device, the guest's memory is gone though it never was."""
    decide = faults.decide

    def takes_it_for_a_device(
        vm: VirtualMachine, vcpu: VCpu, slot: MemorySlot | None, gfn: int, write: bool
    ) -> FaultResult | None:
        known = None if slot is None or slot.flags & INVALID else slot
        return decide(vm, vcpu, known, gfn, write)

    monkeypatch.setattr(faults, "decide", takes_it_for_a_device)
    assert "was taken for a device" in failure(guest_and_move())


# Z42: invalidations elsewhere ---------------------------------------------------------------------


class RetriesForAnySection(Mmu):
    """Z42: as before there was a range, whatever is invalidated makes every fault retry."""

    __slots__ = ()

    def retry(self, seq: int, gfn: int) -> bool:
        return self.invalidate_in_progress > 0 or self.invalidate_seq != seq


async def unrelated_sections() -> int:
    """Another part of memory is under invalidation all the time; how many faults retry."""
    vm = VirtualMachine()
    mm = await started(vm, pages=64)
    vcpu = vm.vcpus[0]
    open_sections = []
    for gfn in range(8):
        section = mm.notifiers.invalidating(
            mn.Range(BASE + (32 + gfn) * PAGE, BASE + (33 + gfn) * PAGE)
        )
        await section.__aenter__()
        open_sections.append(section)
        if len(open_sections) > 1:
            await open_sections.pop(0).__aexit__(None, None, None)
        assert vm.mmu.invalidate_in_progress == 1
        result = await page_fault(vm, vcpu, gfn, write=True)
        assert result is FaultResult.FIXED, "I-PROG: the guest starves"
    await open_sections.pop().__aexit__(None, None, None)
    await finished(mm, vm)
    return vm.counters["retries"]


async def test_z42() -> None:
    """A fault is not kept waiting by what does not concern it, however long that goes on."""
    assert await unrelated_sections() == 0


async def test_z42_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a range no fault is served while there is always a section open."""
    monkeypatch.setattr(notifier, "Mmu", RetriesForAnySection)
    with pytest.raises(AssertionError, match="I-PROG: the guest starves"):
        await unrelated_sections()


async def test_false_retries_are_counted() -> None:
    """The range is a union: what lies between two sections retries in vain, and is told apart."""
    vm = SlowLookups()
    mm = await started(vm, pages=64)

    async def invalidate_another_page() -> None:
        await mm.notifiers.invalidate(mn.Range(BASE + 9 * PAGE, BASE + 10 * PAGE))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(vm.vcpus[0].load, 5 * PAGE)
        tasks.start_soon(invalidate_another_page)
    assert vm.counters["retries"] == vm.counters["false_retries"] == 1
    await finished(mm, vm)


# The end ------------------------------------------------------------------------------------------


def guest_and_unregister(kind: Callable[[], VirtualMachine] = SlowLookups) -> Scenario:
    """A machine is unregistered while its guest faults: nothing is mapped when that is over."""

    async def unregisters_under_a_guest() -> None:
        vm = kind()
        mm = DictMm()
        await mm.map(BASE, BASE + PAGE)
        subscription = await mm.notifiers.register(vm)
        await vm.set_user_memory_region(0, 0, PAGE, BASE)

        async def guest() -> None:
            with suppress(mn.BadAddress):
                for _ in range(3):
                    await vm.vcpus[0].store(0, b"\1")
                    await checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guest, name="guest")
            tasks.start_soon(mm.notifiers.unregister, subscription, name="unregister")
        assert vm.pages_4k == 0, "I-REL: a page is mapped after release"
        await finished(mm, vm)

    return unregisters_under_a_guest


class DropsAndNoMore(SlowLookups):
    """Drops what is mapped, and lets faults that are under way go on."""

    async def release(self) -> None:
        self.zap_all()


def test_release() -> None:
    """A fault that release overtakes maps nothing, and the guest cannot run on."""
    explore(guest_and_unregister(), schedules=1_000).check()


def test_release_mutant() -> None:
    """Without that a page is mapped for which no invalidation will ever come."""
    assert "I-REL" in failure(guest_and_unregister(DropsAndNoMore))


# All at once --------------------------------------------------------------------------------------


def everything() -> Scenario:
    """Two vCPUs, a host that evicts, protects and unmaps, and memslots that change."""

    async def all_at_once() -> None:
        vm = SlowLookups()
        mm = await started(vm, pages=3)

        async def guest(vcpu: VCpu, gfn: int) -> None:
            for value in (b"\1", b"\2"):
                try:
                    await vcpu.store(gfn * PAGE + vcpu.id, value)
                    await vcpu.load(gfn * PAGE)
                except (MmioExit, mn.BadAddress):
                    return

        async def host() -> None:
            await mm.evict(BASE)
            child = await mm.fork()
            await mm.protect(BASE, BASE + PAGE, writable=False)
            await mm.unmap(BASE + PAGE, BASE + 2 * PAGE)
            await child.put()

        async def update() -> None:
            await vm.set_user_memory_region(1, 8 * PAGE, PAGE, BASE)
            await vm.set_user_memory_region(0, 0, 0)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guest, vm.vcpus[0], 0, name="guest 0")
            tasks.start_soon(guest, vm.vcpus[0], 1, name="guest 1")
            tasks.start_soon(host, name="host")
            tasks.start_soon(update, name="update")
        await finished(mm, vm)

    return all_at_once


def test_everything_at_once() -> None:
    """No schedule that was drawn has a stale use, an unbalanced count, a deadlock or a leak."""
    explore(everything(), strategy=PCT(depth=4), schedules=300).check()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["random", "pct", "dfs"])
def test_everything_at_once_for_long(strategy: str) -> None:
    """The same, more of it."""
    explore(everything(), strategy=strategy, schedules=5_000).check()
