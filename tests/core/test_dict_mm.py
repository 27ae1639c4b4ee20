"""The reference address space: it keeps the protocol, and catches who misses a change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

import mmunotify as mn
from dict_mm import DictMm, Frames
from recorders import Deferred, Sleepable
from steps import run_now, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.usefixtures("both_forms", "lines")

A, B, C = 0x10000, 0x11000, 0x12000
PAGE = mn.PAGE_SIZE


class Shadow(mn.AtomicDriver):
    """A secondary MMU that takes no page references: it uses what it has translated."""

    def __init__(self) -> None:
        self.translations: dict[int, mn.Translation] = {}
        self.told: list[tuple[str, int, int, mn.Event]] = []
        self.mm: mn.Primary

    def attach(self, primary: mn.Primary | None) -> None:
        assert primary is not None
        self.mm = primary

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.told.append(("start", rng.start, rng.end, rng.event))
        for page in [page for page in self.translations if rng.overlaps(page, page + PAGE)]:
            del self.translations[page]

    async def release(self) -> None:
        self.translations.clear()

    async def map(self, address: int, *, write: bool = False) -> None:
        self.translations[address] = await self.mm.fault_in(address, write=write)

    def read(self, address: int, size: int) -> bytes:
        return self.mm.read(self.translations[address], 0, size)

    def write(self, address: int, data: bytes) -> None:
        self.mm.write(self.translations[address], 0, data)


class Deaf(Shadow):
    """One that does not listen."""

    def invalidate_range_start(self, rng: mn.Range) -> None:
        pass

    async def release(self) -> None:
        pass


@pytest.fixture
async def mm() -> AsyncIterator[DictMm]:
    async with DictMm() as mm:
        await mm.map(A, C)
        yield mm


async def attach(mm: DictMm, driver: Any) -> Any:
    await mm.notifiers.register(driver)
    return driver


# ------------------------------------------------------------------ the protocol


async def test_it_is_a_primary(mm: DictMm) -> None:
    assert isinstance(mm, mn.Primary)
    primary: mn.Primary = mm
    assert primary.translate(A) is None


async def test_a_page_is_there_once_it_is_faulted_in(mm: DictMm) -> None:
    found = await mm.fault_in(A + 5)
    assert (found.address, found.size, found.writable) == (A, PAGE, True)
    assert mm.translate(A + PAGE - 1) == found
    assert mm.translate(B) is None
    assert run_now(mm.fault_in(A)) == found


async def test_translations_are_columns_in_order(mm: DictMm) -> None:
    await mm.fault_in(B)
    await mm.fault_in(A)
    columns = mm.translate_range(0, mn.ULONG_MAX)
    assert columns.pages == [A >> 12, B >> 12]
    assert len(columns) == 2
    one = mm.translate(B)
    assert one is not None
    assert (columns.frames[1], columns.writable[1], columns.generations[1]) == (
        one.frame,
        1,
        one.generation,
    )
    assert mm.translate_range(B, C).pages == [B >> 12]


async def test_what_is_not_mapped_is_a_bad_address(mm: DictMm) -> None:
    for address in (0, A - 1, C):
        with pytest.raises(mn.BadAddress, match=f"{address:#x}"):
            await mm.fault_in(address)
    with pytest.raises(mn.BadAddress):
        await mm.fault_in_range(B, C + PAGE)
    with pytest.raises(mn.BadAddress):
        await mm.pin(B, C + PAGE)


async def test_what_is_read_only_cannot_be_faulted_in_for_writing() -> None:
    async with DictMm() as mm:
        await mm.map(A, B, writable=False)
        assert not (await mm.fault_in(A)).writable
        with pytest.raises(mn.BadAddress, match="mapped writable"):
            await mm.fault_in(A, write=True)


async def test_devices_read_and_write_by_frame(mm: DictMm) -> None:
    await mm.store(A + 4, b"hello")
    found = await mm.fault_in(A, write=True)
    assert mm.read(found, 4, 5) == b"hello"
    mm.write(found, 0, b"dma!")
    assert await mm.load(A, 9) == b"dma!hello"
    with pytest.raises(ValueError, match=r"\[4090, 4100\)"):
        mm.read(found, 4090, 10)


async def test_devices_do_not_write_through_a_read_only_translation(mm: DictMm) -> None:
    await mm.protect(A, B, writable=False)
    found = await mm.fault_in(A)
    with pytest.raises(PermissionError):
        mm.write(found, 0, b"x")


async def test_the_process_reads_and_writes_across_pages(mm: DictMm) -> None:
    data = bytes(range(256)) * 20
    await mm.store(A + 1000, data)
    assert await mm.load(A + 1000, len(data)) == data
    assert await mm.load(A, 1000) == bytes(1000)


async def test_regions_are_what_is_mapped(mm: DictMm) -> None:
    await mm.map(0x20000, 0x21000, writable=False)
    assert [(r.start, r.end, r.writable) for r in mm.regions(0, mn.ADDRESS_END)] == [
        (A, C, True),
        (0x20000, 0x21000, False),
    ]
    await mm.unmap(B, 0x20800)
    assert [(r.start, r.end) for r in mm.regions(0, mn.ADDRESS_END)] == [
        (A, B),
        (0x20800, 0x21000),
    ]
    assert list(mm.regions(B, 0x20800)) == []


async def test_mapping_over_something_is_refused(mm: DictMm) -> None:
    with pytest.raises(ValueError, match="no mapping there"):
        await mm.map(B, C + PAGE)
    with pytest.raises(ValueError, match="page aligned"):
        await mm.map(0x20001, 0x21000)


# ------------------------------------------------------------------ what drivers are told


async def test_each_change_is_told_with_its_event(mm: DictMm) -> None:
    shadow = await attach(mm, Shadow())
    await mm.store(A, b"x")
    await mm.evict(A)
    await mm.load(A, 1)
    await mm.protect(A, C, writable=False)
    await mm.protect(A, C, writable=True)
    child = await mm.fork()
    await mm.store(A, b"y")
    await mm.unmap(A, B)
    await child.put()
    assert shadow.told == [
        ("start", A, B, mn.Event.CLEAR),
        ("start", A, C, mn.Event.PROTECTION_VMA),
        ("start", A, C, mn.Event.PROTECTION_VMA),
        ("start", A, C, mn.Event.PROTECTION_PAGE),
        ("start", A, B, mn.Event.CLEAR),
        ("start", A, B, mn.Event.UNMAP),
    ]


async def test_what_appears_is_not_told(mm: DictMm) -> None:
    shadow = await attach(mm, Shadow())
    await mm.map(0x20000, 0x21000)
    await mm.fault_in(0x20000, write=True)
    assert shadow.told == []


async def test_the_order_is_s_pt_e_and_then_r(mm: DictMm) -> None:
    """The pte is there at the start and gone at the end; the frame is not free before that."""
    frame = (await mm.fault_in(A)).frame
    seen: list[tuple[str, bool, int]] = []

    class Looks(mn.AtomicDriver):
        def look(self, when: str) -> None:
            seen.append((when, mm.translate(A) is not None, mm.frames[frame].generation))

        def invalidate_range_start(self, rng: mn.Range) -> None:
            self.look("start")

        def invalidate_range_end(self, rng: mn.Range) -> None:
            self.look("end")

    await attach(mm, Looks())
    await mm.unmap(A, B)
    assert seen == [("start", True, 0), ("end", False, 0)]
    assert mm.frames[frame].generation == 1


@pytest.mark.parametrize("locks", [mn.SpinLocks, mn.RwSems])
async def test_pages_are_held_until_the_sync_has_returned(locks: type[mn.LockModel]) -> None:
    """And it runs without the locks: another operation goes on meanwhile."""
    async with DictMm(locks=locks) as mm:
        await mm.map(A, C)
        found = await mm.fault_in(A)
        gate = anyio.Event()
        driver = Deferred("d", sync=gate.wait)
        await mm.notifiers.register(driver)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mm.unmap, A, B)
            await settle()
            mm.read(found, 0, 1)
            run_now(mm.map(0x20000, 0x21000))
            gate.set()
        with pytest.raises(mn.StaleTranslation):
            mm.read(found, 0, 1)


async def test_a_frame_is_reused_at_once_and_its_old_translation_is_found_out(
    mm: DictMm,
) -> None:
    old = await mm.fault_in(A)
    await mm.unmap(A, B)
    new = await mm.fault_in(B)
    assert new.frame == old.frame
    with pytest.raises(mn.StaleTranslation, match=f"frame {old.frame} is of generation"):
        mm.read(old, 0, 1)
    with pytest.raises(mn.StaleTranslation):
        mm.write(old, 0, b"x")
    assert mm.read(new, 0, 1) == b"\0"


@pytest.mark.parametrize("operation", ["unmap", "evict", "store", "exit"])
@pytest.mark.parametrize("driver_type", [Shadow, Deaf])
async def test_who_does_not_listen_is_caught_by_its_next_use(
    driver_type: type[Shadow], operation: str
) -> None:
    """I-FREE, and the negative control of everything above."""
    mm = DictMm()
    await mm.map(A, C)
    await mm.store(A, b"x")
    driver = await attach(mm, driver_type())
    child = await mm.fork()
    await driver.map(A)
    match operation:
        case "unmap":
            await mm.unmap(A, B)
        case "evict":
            assert await mm.evict(A)
        case "store":
            await mm.store(A, b"copied")
        case _:
            await mm.put()
    await child.put()
    if driver_type is Deaf:
        with pytest.raises(mn.StaleTranslation):
            driver.read(A, 1)
    else:
        assert driver.translations == {}


async def test_pages_of_a_driver_that_failed_are_leaked(mm: DictMm) -> None:
    class Fails(Shadow):
        def invalidate_range_start(self, rng: mn.Range) -> None:
            raise OSError

    shadow = Fails()
    sub = await mm.notifiers.register(shadow)
    for address in (A, B):
        await shadow.map(address)
    await mm.unmap(A, B)
    shadow.read(A, 1)
    await mm.unmap(B, C)  # it is not told of this one, and maps the page all the same
    shadow.read(B, 1)
    assert mm.frames.used == 2
    await mm.notifiers.unregister(sub)
    await mm.map(A, B)
    await mm.fault_in(A)
    await mm.unmap(A, B)
    assert mm.frames.used == 2


# ------------------------------------------------------------------ copy on write


async def test_fork_shares_until_one_writes(mm: DictMm) -> None:
    await mm.store(A, b"both")
    async with await mm.fork() as child:
        assert mm.frames.used == 1
        await child.store(A, b"mine")
        assert (await mm.load(A, 4), await child.load(A, 4)) == (b"both", b"mine")
        assert mm.frames.used == 2
        before = await mm.fault_in(A)
        await mm.store(A, b"sole")
        assert (await mm.fault_in(A)).frame == before.frame
    assert await mm.load(A, 4) == b"sole"
    assert mm.frames.used == 1


async def test_i_perm_fork_takes_write_permission_from_devices_too(mm: DictMm) -> None:
    shadow = await attach(mm, Shadow())
    await shadow.map(A, write=True)
    shadow.write(A, b"before")
    async with await mm.fork() as child:
        assert shadow.translations == {}
        await shadow.map(A)
        with pytest.raises(PermissionError):
            shadow.write(A, b"leaked")
        await shadow.map(A, write=True)
        shadow.write(A, b"after!")
        assert await child.load(A, 6) == b"before"


async def test_two_that_break_the_same_page_at_once_make_one_copy(mm: DictMm) -> None:
    await mm.notifiers.register(Sleepable("slow", start=settle))
    await mm.store(A, b"x")
    async with await mm.fork():
        used = mm.frames.used
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mm.store, A, b"first")
            tasks.start_soon(mm.store, A + 8, b"second")
        assert mm.frames.used == used + 1
        assert await mm.load(A, 14) == b"first\0\0\0second"


# ------------------------------------------------------------------ swap, dirty, ageing, pins


async def test_what_was_written_comes_back_from_swap(mm: DictMm) -> None:
    await mm.store(A, b"kept")
    assert await mm.evict(A)
    assert mm.translate(A) is None
    assert not await mm.evict(A)
    assert await mm.load(A, 4) == b"kept"
    assert await mm.evict(A)
    assert await mm.load(A, 4) == b"kept"


@pytest.mark.parametrize("honest", [False, True])
async def test_i_dirty_what_a_device_wrote_is_lost_unless_it_says_so(
    mm: DictMm, honest: bool
) -> None:
    class Writes(Shadow):
        def invalidate_range_start(self, rng: mn.Range) -> None:
            if honest:
                self.mm.set_dirty(rng.start, rng.end)
            super().invalidate_range_start(rng)

    shadow = await attach(mm, Writes())
    await shadow.map(A, write=True)
    shadow.write(A, b"dma!")
    assert await mm.evict(A)
    assert await mm.load(A, 4) == (b"dma!" if honest else bytes(4))


async def test_a_dirty_mask_has_an_entry_for_each_page(mm: DictMm) -> None:
    await mm.fault_in_range(A, C, write=True)
    for page in (A, B):
        mm.write(await mm.fault_in(page, write=True), 0, b"dma!")
    mm.set_dirty(A, C, [0, 1])
    assert await mm.evict(A)
    assert await mm.evict(B)
    assert (await mm.load(A, 4), await mm.load(B, 4)) == (bytes(4), b"dma!")


async def test_i_age_used_by_anybody_is_used(mm: DictMm) -> None:
    class Ages(mn.AtomicDriver):
        accessed = True

        def clear_flush_young(self, start: int, end: int) -> bool:
            accessed, self.accessed = self.accessed, False
            return accessed

    driver = await attach(mm, Ages())
    await mm.load(A, 1)
    assert mm.referenced(A)
    assert not driver.accessed  # asked although the primary said yes
    assert not mm.referenced(A)
    driver.accessed = True
    assert mm.referenced(A)
    mm.mark_young(A, C)
    assert mm.referenced(A)
    assert not mm.referenced(B)


async def test_a_pinned_frame_is_neither_evicted_nor_freed(mm: DictMm) -> None:
    await mm.store(A, b"pinned")
    pin = await mm.pin(A, C)
    assert len(pin.translations) == 2
    assert not await mm.evict(A)
    found = mm.translate(A)
    assert found is not None
    await mm.unmap(A, C)
    assert mm.read(found, 0, 6) == b"pinned"
    mm.unpin(pin)
    with pytest.raises(mn.StaleTranslation):
        mm.read(found, 0, 6)
    with pytest.raises(ValueError, match="still held"):
        mm.unpin(pin)
    assert mm.frames.used == 0


async def test_a_pinned_page_stays_with_the_parent_of_a_fork(mm: DictMm) -> None:
    pin = await mm.pin(A, B)
    found = await mm.fault_in(A, write=True)
    async with await mm.fork() as child:
        await mm.store(A, b"parent")
        assert mm.read(found, 0, 6) == b"parent"
        assert await child.load(A, 6) == bytes(6)
    mm.unpin(pin)


# ------------------------------------------------------------------ lifetime


async def test_mm_users_keep_the_pages_and_mm_count_keeps_the_object() -> None:
    mm = DictMm()
    await mm.map(A, B)
    await mm.store(A, b"x")
    assert mm.tryget()
    await mm.put()
    assert mm.frames.used == 1
    mm.grab()
    await mm.put()
    assert (mm.mm_users, mm.mm_count) == (0, 1)
    assert mm.frames.used == 0
    assert not mm.tryget()
    assert mm.mm_users == 0
    with pytest.raises(mn.BadAddress):
        await mm.fault_in(A)
    mm.drop()
    assert mm.mm_count == 0


async def test_the_exit_releases_drivers_before_it_frees_pages() -> None:
    frames = Frames()
    used: list[int] = []

    class Looks(Shadow):
        async def release(self) -> None:
            used.append(frames.used)
            self.read(A, 1)
            await super().release()

    async with DictMm(frames) as mm:
        await mm.map(A, B)
        looks = await attach(mm, Looks())
        await looks.map(A)
    assert used == [1]
    assert frames.used == 0
    with pytest.raises(mn.AddressSpaceExited):
        await mm.notifiers.register(Shadow())


async def test_registration_excludes_open_sections(mm: DictMm) -> None:
    """I-REG by mmap_lock and anon_vma, as mm_take_all_locks does."""
    gate = anyio.Event()
    await mm.notifiers.register(Sleepable("slow", start=gate.wait))
    await mm.fault_in(A)
    late = Shadow()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mm.evict, A)
        await settle()
        tasks.start_soon(mm.notifiers.register, late)
        await settle()
        waiting = late.serves is None
        gate.set()
    assert waiting
    assert late.told == []
