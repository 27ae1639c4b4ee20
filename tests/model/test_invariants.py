"""The checker says which rule was broken, and nothing about runs that break none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import mmunotify as mn
from mmunotify.errors import InvariantViolated
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f
from mmunotify.model.invariants import InvariantChecker
from mmunotify.model.primary import ModelPrimary

PAGE = mn.PAGE_SIZE


async def a_process(machine: Machine[mn.RwSems]) -> tuple[AddressSpace[mn.RwSems], int]:
    mm = machine.new_mm("P")
    address = await mm.mmap(8 * PAGE)
    await mm.write(address, b"x" * 8 * PAGE)
    return mm, address


def forget_page(mm: AddressSpace[mn.RwSems], page: int) -> None:
    frame = mm.pt.get(page) >> 12
    mm.set_pte(page, 0)
    mm.machine.remove_rmap(frame & 0xFFFFFF)
    mm.machine.frames.put(frame & 0xFFFFFF)


def swap_two(mm: AddressSpace[mn.RwSems], page: int) -> None:
    first, second = mm.pt.get(page), mm.pt.get(page + 1)
    mm.set_pte(page, second)
    mm.set_pte(page + 1, first)


def protect(mm: AddressSpace[mn.RwSems], page: int) -> None:
    mm.set_pte(page, mm.pt.get(page) & ~f.PTE_RW)


@pytest.mark.parametrize(
    ("rule", "misdeed"),
    [("I-FREE", forget_page), ("I-COW", swap_two), ("I-PERM", protect)],
)
async def test_change_behind_the_back_is_named(
    rule: str, misdeed: Callable[[AddressSpace[mn.RwSems], int], None]
) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        checker = InvariantChecker(machine)
        checker.watch(mm)
        misdeed(mm, address >> 12)
        with pytest.raises(InvariantViolated, match=rule):
            checker.check()


async def test_section_left_open_is_named() -> None:
    async with Machine(frames=256) as machine:
        mm, address = await a_process(machine)
        checker = InvariantChecker(machine)
        checker.watch(mm)
        rng = mn.Range(address, address + PAGE)
        told = await mm.notifiers.invalidate_range_start(rng)
        with pytest.raises(InvariantViolated, match="I-PROG"):
            checker.__exit__(None, None, None)
        await mm.notifiers.invalidate_range_end(rng, told)


class Device(mn.AtomicDriver):
    """Keeps translations, and drops those that it is told to drop; a mutant does not."""

    primary: ModelPrimary

    def __init__(self) -> None:
        self.kept: dict[int, mn.Translation] = {}

    def attach(self, primary: object) -> None:
        assert isinstance(primary, ModelPrimary)
        self.primary = primary

    async def load(self, address: int) -> bytes:
        """Read through the translation that it has, or a new one."""
        if address not in self.kept:
            self.kept[address] = await self.primary.fault_in(address)
        return self.primary.read(self.kept[address], 0, 1)

    def invalidate_range_start(self, rng: mn.Range) -> None:
        for address in [a for a in self.kept if rng.overlaps(a, a + PAGE)]:
            del self.kept[address]


class Deaf(Device):
    """Ignores what it is told."""

    def invalidate_range_start(self, rng: mn.Range) -> None:
        pass


class Nosy(mn.SleepableDriver):
    """Unmaps memory of its own address space from within a callback."""

    mm: AddressSpace[mn.RwSems]
    spare: int

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        if not rng.overlaps(self.spare, self.spare + PAGE):
            await self.mm.munmap(self.spare, PAGE)


class Careless(mn.AtomicInterval):
    """Takes note of the sequence number after its lookup (the snapshot that comes too late)."""

    kept: mn.Translation

    def invalidate(self, rng: mn.Range, seq: int) -> bool:
        self.set_seq(seq)
        return True


@pytest.fixture
def rule_broken() -> Callable[[InvariantChecker, str], None]:
    def broken(checker: InvariantChecker, rule: str) -> None:
        with pytest.raises(InvariantViolated, match=f"^{rule}:"):
            checker.check()

    return broken


Broken = Callable[[InvariantChecker, str], None]


async def checked(machine: Machine[mn.RwSems]) -> InvariantChecker:
    checker = InvariantChecker(machine)
    for mm in machine.mms:
        checker.watch(mm)
    return checker


async def test_device_that_keeps_what_was_unmapped(rule_broken: Broken) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        device = Deaf()
        await mm.register(device)
        checker = await checked(machine)
        await device.load(address)
        await mm.munmap(address, PAGE)
        with pytest.raises(mn.StaleTranslation, match=r"^Deaf of P holds.*it missed .*UNMAP"):
            await device.load(address)
        rule_broken(checker, "I-FREE")


async def test_device_that_keeps_what_was_protected(rule_broken: Broken) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        device = Deaf()
        await mm.register(device)
        checker = await checked(machine)
        await device.load(address)
        await mm.mprotect(address, PAGE, f.PROT_READ)
        await device.load(address)
        rule_broken(checker, "I-INFLIGHT")


async def test_device_that_looks_up_in_an_open_section(rule_broken: Broken) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        device = Device()
        await mm.register(device)
        checker = await checked(machine)
        rng = mn.Range(address, address + PAGE)
        told = await mm.notifiers.invalidate_range_start(rng)
        await device.load(address)
        await mm.notifiers.invalidate_range_end(rng, told)
        rule_broken(checker, "I-NOEST")


async def test_interval_that_takes_its_sequence_number_too_late(rule_broken: Broken) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        interval = Careless()
        await interval.insert(mm.notifiers, address, PAGE)
        checker = await checked(machine)
        kept = await mm.primary.fault_in(address)
        await mm.mprotect(address, PAGE, f.PROT_READ)
        seq = await interval.read_begin()
        assert not interval.read_retry(seq)
        mm.primary.read(kept, 0, 1)
        rule_broken(checker, "I-SEQ")
        await interval.remove()


async def test_device_that_writes_without_a_word(rule_broken: Broken) -> None:
    async with Machine(frames=256, contents=True) as machine:
        file = machine.file(4, "ext4", fill=True)
        mm = machine.new_mm("P")
        address = await mm.mmap(4 * PAGE, flags=f.MAP_SHARED, file=file)
        checker = await checked(machine)
        machine.frames.on_drop = checker._dropped
        translation = await mm.primary.fault_in(address)
        assert machine.frames.data is not None
        machine.frames.data[translation.frame][:4] = b"DMA!"
        await mm.madvise(address, PAGE, "pageout")
        rule_broken(checker, "I-DIRTY")


async def test_device_that_says_so_is_written_back() -> None:
    async with Machine(frames=256, contents=True) as machine:
        file = machine.file(4, "ext4", fill=True)
        mm = machine.new_mm("P")
        address = await mm.mmap(4 * PAGE, flags=f.MAP_SHARED, file=file)
        with InvariantChecker(machine):
            translation = await mm.primary.fault_in(address)
            assert machine.frames.data is not None
            machine.frames.data[translation.frame][:4] = b"DMA!"
            mm.primary.set_dirty(address, address + PAGE)
            await mm.madvise(address, PAGE, "pageout")
            await machine.fsync(file)
            await mm.madvise(address, PAGE, "pageout")
            assert await machine.pread(file, 0, 4) == b"DMA!"


async def test_device_that_hides_what_it_used(rule_broken: Broken) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        device = Device()
        await mm.register(device)
        checker = await checked(machine)
        await device.load(address)
        mm.age(address, address + PAGE)
        await device.load(address)
        assert not mm.age(address, address + PAGE)
        rule_broken(checker, "I-AGE")


async def test_device_that_tells_what_it_used() -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        device = Device()
        await mm.register(device)
        with InvariantChecker(machine):
            await device.load(address)
            mm.age(address, address + PAGE)
            await device.load(address)
            mm.primary.mark_young(address, address + PAGE)
            mm.age(address, address + PAGE)


async def test_callback_that_takes_a_lock_of_its_caller(rule_broken: Broken) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        driver = Nosy()
        driver.mm, driver.spare = mm, await mm.mmap(PAGE)
        await mm.register(driver)
        checker = await checked(machine)
        await mm.munmap(address, PAGE)
        rule_broken(checker, "I-CTX")


async def test_end_that_is_told_twice(rule_broken: Broken) -> None:
    async with Machine(frames=256) as machine:
        mm, address = await a_process(machine)
        await mm.register(Device())
        checker = await checked(machine)
        rng = mn.Range(address, address + PAGE)
        told = await mm.notifiers.invalidate_range_start(rng)
        await mm.notifiers.invalidate_range_end(rng, told)
        told.open += 1
        await mm.notifiers.invalidate_range_end(rng, told)
        rule_broken(checker, "I-PAIR")


class Both(Device):
    def invalidate_range_end(self, rng: mn.Range) -> None:
        pass


async def test_driver_that_comes_in_the_middle_of_a_section(rule_broken: Broken) -> None:
    """A registration that does not wait, and an end that goes to whoever is there by then."""
    async with Machine(frames=256) as machine:
        mm, address = await a_process(machine)
        checker = await checked(machine)
        rng = mn.Range(address, address + PAGE)
        told = await mm.notifiers.invalidate_range_start(rng)
        mm.notifiers._publish(Both())
        checker._watched[0].known |= {s.name: s for s in mm.notifiers._subscriptions}
        now = mm.notifiers._audience
        now.open, told.open = told.open, now.open
        await mm.notifiers.invalidate_range_end(rng, now)
        rule_broken(checker, "I-REG")


async def test_driver_that_is_told_after_its_release(rule_broken: Broken) -> None:
    """An exit that forgets to take the drivers off the list that reclaim walks."""
    async with Machine(frames=256) as machine:
        mm, address = await a_process(machine)
        await mm.register(Device())
        checker = await checked(machine)
        await mm.mprotect(address, PAGE, f.PROT_READ)
        stale = mm.notifiers._audience
        await mm.notifiers.release()
        mm.notifiers._audience = stale
        rng = mn.Range(address, address + PAGE)
        told = await mm.notifiers.invalidate_range_start(rng)
        await mm.notifiers.invalidate_range_end(rng, told)
        rule_broken(checker, "I-REL")


async def test_every_operation_keeps_the_rules() -> None:
    async with Machine(frames=512, swap=512, contents=True) as machine:
        with InvariantChecker(machine) as checker:
            mm, address = await a_process(machine)
            child = await mm.fork(name="c")
            await mm.write(address, b"y" * PAGE)
            await child.write(address + PAGE, b"z" * 2 * PAGE)
            await mm.mprotect(address, 4 * PAGE, f.PROT_READ)
            await mm.mprotect(address, 4 * PAGE, f.PROT_READ | f.PROT_WRITE)
            moved = await mm.mremap(address, 4 * PAGE, 4 * PAGE, 3, address + 64 * PAGE)
            await mm.madvise(moved, 4 * PAGE, "pageout")
            assert await mm.read(moved, 1) == b"y"
            await machine.reclaim()
            assert await child.read(address + PAGE, 1) == b"z"
            await machine.migrate(child, address + PAGE)
            await mm.madvise(moved, PAGE, "dontneed")
            await mm.munmap(address, 128 * PAGE)
            await child.exit()
        assert checker.step > 40
    assert machine.frames.used == 1
    assert machine.swap.used == 0
