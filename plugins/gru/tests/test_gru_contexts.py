"""Contexts: loaded, unloaded, stolen, moved, closed; and what they had is what they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from dict_mm import DictMm
from mmunotify_gru import Exop, Gru, GruChecker, Xtype
from mmunotify_gru.errors import ContextClosed, GruError, InstructionException, NoResources
from mmunotify_gru.hardware.instructions import Cause, CbStatus, Instruction, Opcode
from mmunotify_gru.state import current_blade

if TYPE_CHECKING:
    from mmunotify_gru import Context

BASE = 0x10000


async def mapped(name: str = "mm") -> DictMm:
    mm = DictMm(name=name)
    await mm.map(BASE, BASE + 0x10000)
    return mm


async def test_the_first_gets_and_the_last_puts() -> None:
    """The address space tells one driver, as long as there is a context."""
    gru = Gru()
    async with await mapped() as mm:
        assert not mm.notifiers.armed
        async with gru.open(mm.notifiers):
            async with gru.open(mm.notifiers) as two:
                await two.vload(BASE, elements=1)
                assert mm.notifiers.statistics().subscriptions == 1
            assert mm.notifiers.statistics().subscriptions == 1
        assert mm.notifiers.statistics().subscriptions == 0
        await mm.notifiers.barrier()
        assert gru.drivers == []
        assert (gru.statistics.gms_alloc, gru.statistics.gms_free) == (1, 1)


async def test_a_reload_brings_everything_back() -> None:
    """Data segment, atomic values, exceptions, and an instruction that was half done."""
    gru = Gru()
    async with await mapped() as mm:  # noqa: SIM117
        async with gru.open(mm.notifiers, cbs=2, dseg=2048, miss="poll") as context:
            await context.put(100, b"kept")
            await mm.store(BASE, bytes(range(64)))
            began = await context.start(Instruction(Opcode.VLOAD, BASE, 512, Xtype.DW, 9, 1024))
            statuses = [began.status]
            first = context.gts.cch
            assert context.unload()
            assert not context.unload()
            statuses.append(began.status)
            assert statuses == [CbStatus.CALL_OS, CbStatus.ACTIVE]
            async with gru.open(mm.notifiers) as other:
                await other.nop()
                with pytest.raises(InstructionException):
                    await began.wait()
            assert context.gts.cch is not first
            assert await context.get(100, 4) == b"kept"
            assert await context.get(512, 8) == bytes(range(8))
            assert gru.statistics.user_unload_context == 2


async def test_contexts_are_spread_over_chiplets() -> None:
    """Each goes where fewest are."""
    gru = Gru()
    async with await mapped() as mm, gru.open(mm.notifiers) as a, gru.open(mm.notifiers) as b:
        for context in (a, b):
            await context.nop()
        assert [state.active for state in gru.states] == [1, 1]


@pytest.mark.parametrize(
    "options",
    [{"cbs": 129}, {"cbs": 0}, {"dseg": 32769}, {"dseg": 0}, {"blade": 1}, {"chiplet": 2}],
)
async def test_what_no_chiplet_has_is_refused(options: dict[str, Any]) -> None:
    """At once, and nothing is registered."""
    async with await mapped() as mm:
        with pytest.raises(NoResources):
            async with Gru().open(mm.notifiers, **options):
                pass
        assert not mm.notifiers.armed


async def test_a_gru_translates_with_the_primary() -> None:
    """Without one there is nothing to open; and an address space has one GRU."""
    bare = mn.Notifiers()
    async with Gru().open(bare) as context:
        with pytest.raises(GruError, match="expected Notifiers"):
            await context.nop()
    async with await mapped() as mm, Gru().open(mm.notifiers):
        with pytest.raises(GruError, match="expected to use that one"):
            async with Gru().open(mm.notifiers):
                pass


async def test_a_full_gru_is_shared_by_stealing() -> None:
    """More contexts than there are places: each gets its turn, and each is served rightly."""
    gru = Gru(assign_delay=0, steal_delay=0)
    async with await mapped("a") as one, await mapped("b") as two:
        for mm in (one, two):
            await mm.store(BASE, mm.notifiers.name.encode() * 8)
        with GruChecker(gru) as checker:
            async with anyio.create_task_group() as tg:
                done: list[int] = []

                async def use(number: int) -> None:
                    mm = (one, two)[number % 2]
                    async with gru.open(mm.notifiers, dseg=2048) as context:
                        for turn in range(4):
                            await context.put(8, bytes((number, turn)))
                            await context.vload(BASE, elements=1)
                            await checkpoint()
                            got = await context.get(0, 10)
                            assert got == mm.notifiers.name.encode() * 8 + bytes((number, turn))
                            checker.check()
                    done.append(number)

                for number in range(40):
                    tg.start_soon(use, number)
            assert sorted(done) == list(range(40))
        statistics = gru.statistics
        assert statistics.steal_user_context > 0
        assert statistics.assign_context_failed > 0
        assert statistics.load_user_context == statistics.free_context


async def test_stealing_goes_round_and_spares_who_is_at_work() -> None:
    """The next victim is behind the last one; a context whose lock is held is passed over."""
    gru = Gru(assign_delay=0, steal_delay=0)
    async with await mapped() as mm, contexts(gru, mm, 17, dseg=1024, chiplet=0) as opened:
        for context in opened[:16]:
            await context.nop()
        over = anyio.Event()

        async def work() -> None:
            async with opened[0].gts.lock.writing():
                await over.wait()

        async with anyio.create_task_group() as tg:
            tg.start_soon(work)
            await anyio.wait_all_tasks_blocked()
            await opened[16].nop()
            over.set()
        assert opened[0].gts.state is not None
        assert opened[1].gts.state is None
        assert opened[1].gts.user.context_stolen == 1
        await opened[1].nop()
        assert opened[2].gts.state is None


class contexts:  # noqa: N801 - reads as a function
    """Several contexts of one address space."""

    def __init__(self, gru: Gru, mm: DictMm, count: int, **options: Any) -> None:
        self._made = [gru.open(mm.notifiers, **options) for _ in range(count)]

    async def __aenter__(self) -> list[Context]:
        return [await made.__aenter__() for made in self._made]

    async def __aexit__(self, *error: Any) -> None:
        for made in reversed(self._made):
            await made.__aexit__(*error)


async def test_a_task_that_moves_takes_its_context_along() -> None:
    """On another blade its next miss finds it badly placed; it goes on where the task is."""
    gru = Gru(blades=2)
    async with await mapped() as mm, gru.open(mm.notifiers, miss="poll") as context:
        await context.vload(BASE, elements=1)
        assert context.gts.state in gru.states[:2]
        current_blade.set(1)
        await context.vload(BASE, elements=1)
        assert context.gts.state in gru.states[:2]
        await context.vload(BASE + 0x1000, elements=1)
        assert context.gts.state in gru.states[2:]
        assert gru.statistics.check_context_unload == 1
        context.place(blade=0, chiplet=1)
        places = [context.gts.state]
        await context.nop()
        places.append(context.gts.state)
        assert places == [None, gru.states[1]]
        with pytest.raises(NoResources):
            context.place(blade=2)
        current_blade.set(0)


async def test_off_blade_flushes_use_the_shared_handles() -> None:
    """A processor of another blade has no handle of its own on this one."""
    gru = Gru(blades=2)
    async with await mapped() as mm, gru.open(mm.notifiers, blade=0, chiplet=0) as context:
        await context.vload(BASE, elements=1)
        current_blade.set(1)
        for _ in range(3):
            await mm.notifiers.invalidate(mn.Range(BASE, BASE + 0x1000))
        current_blade.set(0)
        used = [tgh.number for tgh in gru.chiplets[0].tghs if tgh.invalidates]
        assert len(used) == 3
        assert min(used) >= 12


@pytest.mark.parametrize("miss", ["interrupt", "poll"])
async def test_exit_closes_the_contexts_that_are_open(miss: str) -> None:
    """What was waiting is told so, and what comes later."""
    gru = Gru()
    mm = await mapped()
    async with gru.open(mm.notifiers, miss=miss) as context:
        await context.vload(BASE, elements=1)

        async def wait() -> None:
            with pytest.raises(ContextClosed):
                await context.gamerr(Exop.EPOLL, BASE, 1)

        async with anyio.create_task_group() as tg:
            tg.start_soon(wait)
            await checkpoint()
            await mm.put()
        with pytest.raises(ContextClosed):
            await context.nop()
    assert [state.active for state in gru.states] == [0, 0]
    with pytest.raises(ContextClosed):
        await context.nop()
    with pytest.raises(ContextClosed):
        await context.get(0, 1)


async def test_polling_waits_for_a_value() -> None:
    """EPOLL until it is there, NPOLL until it has gone; others run meanwhile."""
    async with await mapped() as mm:
        async with Gru().open(mm.notifiers) as context, anyio.create_task_group() as tg:
            order: list[str] = []

            async def poll() -> None:
                assert await context.gamerr(Exop.EPOLL, BASE, 7) == 7
                order.append("equal")
                assert await context.gamerr(Exop.NPOLL, BASE, 7) == 8
                order.append("not equal")

            tg.start_soon(poll)
            for value in (5, 7, 8):
                for _ in range(4):
                    await checkpoint()
                order.append(str(value))
                await mm.store(BASE, value.to_bytes(8, "little"))
                for _ in range(4):
                    await checkpoint()
        assert order == ["5", "7", "equal", "8", "not equal"]


async def test_instructions_wait_for_a_free_block() -> None:
    """More at once than there are blocks: all are done, and a cancelled one blocks nobody."""
    async with await mapped() as mm, Gru().open(mm.notifiers, cbs=1) as context:
        async with anyio.create_task_group() as tg:
            poll = anyio.CancelScope()

            async def polls() -> None:
                with poll:
                    await context.gamerr(Exop.EPOLL, BASE, 1)

            async def adds() -> None:
                await context.gamer(Exop.ADD, BASE + 8, 1)

            tg.start_soon(polls)
            await checkpoint()
            waiting = anyio.CancelScope()

            async def gives_up() -> None:
                with waiting:
                    await adds()

            tg.start_soon(gives_up)
            for _ in range(5):
                tg.start_soon(adds)
            for _ in range(3):
                await checkpoint()
            waiting.cancel()
            await checkpoint()
            poll.cancel()
        assert await context.gamir(Exop.FETCH, BASE + 8) == 5


async def test_a_long_copy_lets_others_run() -> None:
    """It goes on in steps, with a checkpoint between them."""
    async with DictMm() as mm:
        await mm.map(0, 1 << 24)
        ticks = 0
        async with Gru().open(mm.notifiers) as context, anyio.create_task_group() as tg:

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await checkpoint()
                    ticks += 1

            tg.start_soon(tick)
            await mm.store((1 << 23) - 100, b"x" * 100)
            await context.bcopy(0, 1 << 23, 1 << 23)
            tg.cancel_scope.cancel()
        assert ticks >= 2
        assert await mm.load((1 << 24) - 101, 101) == b"\0" + b"x" * 100


@pytest.mark.parametrize(("errors", "fails"), [(3, False), (4, True)])
async def test_what_may_go_well_is_tried_again(errors: int, fails: bool) -> None:
    """Three times; then its user is told."""
    gru = Gru()
    async with await mapped() as mm, gru.open(mm.notifiers, chiplet=0) as context:
        gru.chiplets[0].fabric.extend([Cause.EXECUTION_HW_ERROR] * errors)
        if fails:
            with pytest.raises(InstructionException) as caught:
                await context.vset(BASE, 1, elements=1)
            assert caught.value.cause is Cause.EXECUTION_HW_ERROR
        await context.vset(BASE, 1, elements=1)
        assert gru.statistics.user_exception == fails


async def test_an_exception_says_where_it_stopped() -> None:
    """Address, cause, and how many elements are done; the block can be used again."""
    gru = Gru()
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000)
        await mm.map(BASE + 0x2000, BASE + 0x3000, writable=False)
        async with gru.open(mm.notifiers) as context:
            with pytest.raises(InstructionException) as caught:
                await context.vset(BASE + 0xF00, 1, elements=64)
            assert caught.value.cause is Cause.OS_FATAL_TLB_FAULT
            assert (caught.value.address, caught.value.progress) == (BASE + 0x1000, 32)
            assert "VSET stopped with" in str(caught.value)
            with pytest.raises(InstructionException):
                await context.vset(BASE + 0x2000, 1, elements=1)
            with pytest.raises(InstructionException) as caught:
                await context.vload(BASE + 4, elements=1)
            assert caught.value.cause is Cause.IAA_GAA_MISMATCH
            await context.vload(BASE + 0x2000, elements=1)


async def test_a_store_reaches_the_disk() -> None:
    """I-DIRTY: what only the GRU has written survives that the page is swapped out."""
    async with await mapped() as mm, Gru().open(mm.notifiers) as context:
        await context.vload(BASE, elements=1)
        await context.vset(BASE, 0x42, elements=1)
        await mm.evict(BASE)
        await context.vload(BASE, elements=1)
        assert await context.get(0, 8) == b"\x42" + bytes(7)
        # Clean again, and in the TLB for loads: the store has to ask.
        await context.vset(BASE, 0x43, elements=1)
        await mm.evict(BASE)
        assert await mm.load(BASE, 1) == b"\x43"


async def test_a_copy_preloads_what_it_comes_to() -> None:
    """One interrupt for several pages, of source and destination, and none behind the end."""
    async with await mapped() as mm:
        await mm.store(BASE, bytes(0x8000))
        await mm.store(BASE + 0x8000, bytes(0x8000))
        gru = Gru()
        async with gru.open(mm.notifiers, preload=8) as context:
            await context.bcopy(BASE, BASE + 0x8000, 0x5000)
        assert gru.statistics.intr == 2
        assert gru.statistics.tlb_preload_page == 8
        assert gru.statistics.tlb_dropin == 2
