"""Frames of coroutines, suspended and not."""

from __future__ import annotations

from typing import Any

import anyio

from mmunotify.locks.places import await_frames


class Look:
    """The names of all frames. No function: calling it is something interpreters do not tune."""

    def __call__(self, coroutine: Any) -> list[str]:
        return [frame.f_code.co_name for frame in await_frames(coroutine)]


async def test_frames_of_all_tasks_from_a_finally_block() -> None:
    """Of one that is suspended down to where it waits; of one that is being cancelled, and asks
    itself, the first alone. (Interpreters have crashed here, at one call of some thousand.)"""
    look = Look()
    found: list[list[str]] = []

    async def inner() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            (mine,) = [task for task in anyio.get_running_tasks() if task.name == "outer"]
            found.extend(look(mine.coro) for _ in range(5000))

    async def outer() -> None:
        await inner()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outer, name="outer")
        await anyio.wait_all_tasks_blocked()
        (task,) = [task for task in anyio.get_running_tasks() if task.name == "outer"]
        names = look(task.coro)
        assert names[names.index("outer") :][:3] == ["outer", "inner", "sleep_forever"]
        tasks.cancel_scope.cancel()
    assert {len(names) for names in found} == {1}
