"""Random sequences of operations on the locks, against models that are too simple to be wrong."""

from __future__ import annotations

import asyncio
import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Protocol

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmunotify.locks import SRCU, RWSemaphore, lockdep

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


@pytest.fixture(params=["plain", "checked"], autouse=True)
def both_forms(request: pytest.FixtureRequest) -> Iterator[None]:
    with lockdep.checking(request.param == "checked"):
        yield
    lockdep.reset()


# The rwsem --------------------------------------------------------------------------------------


class QueueModel:
    """A fair rwsem as one would draw it: those who hold it, and a queue."""

    def __init__(self) -> None:
        self.holders: dict[int, str] = {}
        self.queue: list[tuple[int, str]] = []

    def fits(self, mode: str) -> bool:
        return not self.holders if mode == "w" else "w" not in self.holders.values()

    def arrive(self, name: int, mode: str) -> None:
        self.queue.append((name, mode))
        self.advance()

    def leave(self, name: int) -> None:
        self.holders.pop(name, None)
        self.queue = [(other, mode) for other, mode in self.queue if other != name]
        self.advance()

    def downgrade(self, name: int) -> None:
        self.holders[name] = "r"
        self.advance()

    def advance(self) -> None:
        while self.queue and self.fits(self.queue[0][1]):
            name, mode = self.queue.pop(0)
            self.holders[name] = mode


class Actor:
    """Takes the semaphore, holds it until it is told to let go, or is cancelled on the way."""

    def __init__(self, sem: RWSemaphore, mode: str) -> None:
        self.guard = sem.reading() if mode == "r" else sem.writing()
        self.gate = anyio.Event()
        self.holds = False

    async def __call__(self) -> None:
        async with self.guard:
            self.holds = True
            try:
                await self.gate.wait()
            finally:
                self.holds = False


class Spawn(Protocol):
    """Starts an actor and returns what cancels it."""

    def __call__(self, actor: Actor) -> Callable[[], object]: ...


async def in_scopes(act: Callable[[Spawn], Awaitable[None]]) -> None:
    async def run(actor: Actor, scope: anyio.CancelScope) -> None:
        with scope:
            await actor()

    def spawn(actor: Actor) -> Callable[[], object]:
        scope = anyio.CancelScope()
        tasks.start_soon(run, actor, scope)
        return scope.cancel

    async with anyio.create_task_group() as tasks:
        await act(spawn)


async def in_native_tasks(act: Callable[[Spawn], Awaitable[None]]) -> None:
    tasks: list[asyncio.Task[None]] = []

    def spawn(actor: Actor) -> Callable[[], object]:
        tasks.append(asyncio.ensure_future(actor()))
        return tasks[-1].cancel

    await act(spawn)
    await asyncio.gather(*tasks, return_exceptions=True)


operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["r", "w", "try r", "try w", "downgrade", "settle"])),
        st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 5)),
    ),
    max_size=30,
)


async def play(script: list[tuple[str, *tuple[int, ...]]], spawn: Spawn) -> None:
    """Do what the script says to a semaphore and to the model, and compare whenever all is quiet.

    Releases and cancellations that follow each other happen in one step: a lock may have been
    handed to somebody who is cancelled before it runs.
    """
    sem, model = RWSemaphore("mmap_lock"), QueueModel()
    actors: dict[int, tuple[Actor, Callable[[], object]]] = {}

    async def settle() -> None:
        await anyio.wait_all_tasks_blocked()
        assert {name for name, (actor, _) in actors.items() if actor.holds} == set(model.holders)
        found = sem.statistics()
        held, queued = list(model.holders.values()), [mode for _, mode in model.queue]
        assert (found.readers, found.writer) == (held.count("r"), "w" in held)
        assert (found.waiting_readers, found.waiting_writers) == (
            queued.count("r"),
            queued.count("w"),
        )
        assert sem.locked == bool(held)
        assert sem.is_contended == sem.needbreak == bool(queued)

    for number, (operation, *rest) in enumerate(script):
        if operation in ("leave", "cancel"):
            candidates = list(model.holders) if operation == "leave" else list(actors)
            if candidates:
                name = candidates[rest[0] % len(candidates)]
                actor, cancel = actors.pop(name)
                model.leave(name)
                actor.gate.set() if operation == "leave" else cancel()
            continue
        await settle()
        if operation in ("r", "w"):
            actor = Actor(sem, operation)
            actors[number] = actor, spawn(actor)
            model.arrive(number, operation)
            await settle()
        elif operation.startswith("try"):
            mode = operation[-1]
            taken = sem.down_read_trylock() if mode == "r" else sem.down_write_trylock()
            assert taken == (not model.queue and model.fits(mode))
            if taken:
                sem.up_read() if mode == "r" else sem.up_write()
        elif operation == "downgrade" and "w" in model.holders.values():
            sem.downgrade_write()
            model.downgrade(next(iter(model.holders)))
            await settle()
    for name in [*model.holders, *(name for name, _ in model.queue)]:
        actors[name][0].gate.set()
    await anyio.wait_all_tasks_blocked()
    assert not sem.locked
    assert not sem.is_contended


WAYS = [
    pytest.param("asyncio", in_scopes, id="asyncio"),
    pytest.param("asyncio", in_native_tasks, id="asyncio, native tasks"),
]
if importlib.util.find_spec("trio"):
    WAYS.append(pytest.param("trio", in_scopes, id="trio"))


@pytest.mark.parametrize(("backend", "way"), WAYS)
@settings(max_examples=60, deadline=None)
@given(script=operations)
def test_the_rwsem_is_the_queue_that_it_says_it_is(
    backend: str,
    way: Callable[[Callable[[Spawn], Awaitable[None]]], Awaitable[None]],
    script: list[tuple[str, *tuple[int, ...]]],
) -> None:
    anyio.run(way, partial(play, script), backend=backend)


# SRCU -------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "call"]), st.integers(0, 9))))
def test_a_callback_runs_exactly_when_the_readers_of_its_call_have_left(
    script: list[tuple[str, int]],
) -> None:
    srcu = SRCU()
    readers: list[tuple[int, int]] = []
    waiting: dict[int, set[int]] = {}
    ran: set[int] = set()
    for number, (operation, which) in enumerate(script):
        if operation == "enter":
            readers.append((number, srcu.read_lock()))
        elif operation == "leave" and readers:
            name, index = readers.pop(which % len(readers))
            srcu.read_unlock(index)
            for waited_for in waiting.values():
                waited_for.discard(name)
        elif operation == "call":
            waiting[number] = {name for name, _ in readers}
            srcu.call(lambda number=number: ran.add(number))  # type: ignore[misc]
        assert ran == {call for call, waited_for in waiting.items() if not waited_for}
        assert srcu.readers == len(readers)
    for _, index in readers:
        srcu.read_unlock(index)
    assert ran == set(waiting)
    assert srcu.statistics().grace_periods == 0
