"""The swap storm at full size, in a process of its own so that its peak memory is its own.

Run with `examples` on the path. Prints CPU time per page touched, in calls that are measured all
along (their mean, as the storm's is one), and the peak of the resident memory in bytes.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from time import process_time_ns

import anyio

from swap_storm import FULL, Storm, machine_for, swap_storm

from ._bench import bare_calls

CALLS = 2000


def peak_rss() -> int:
    """The peak of the resident memory, in bytes.

    VmHWM where there is one: ru_maxrss begins with that of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024


async def measure(pages: int, loops: int) -> dict[str, float]:
    calls = taken_by_calls = 0
    done: list[Storm] = []

    async def call_now_and_then() -> None:
        nonlocal calls, taken_by_calls
        while not done:
            began = process_time_ns()
            bare_calls(CALLS)
            taken_by_calls += process_time_ns() - began
            calls += CALLS
            await anyio.sleep(0.01)

    began = process_time_ns()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call_now_and_then)
        async with machine_for(pages) as machine:
            done.append(await swap_storm(machine, pages, loops))
    taken = process_time_ns() - began - taken_by_calls
    return {
        "calls_per_page": taken / done[0].touched / (taken_by_calls / calls),
        "peak_rss": peak_rss(),
    }


if __name__ == "__main__":
    print(json.dumps(anyio.run(measure, FULL, 2)))
