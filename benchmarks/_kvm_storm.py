"""The swap storm with a whole virtual machine: a guest in swap beside a process that allocates.

Run with `examples` on the path, in a process of its own. Prints CPU time per page touched, in calls
that are measured all along (their mean, as the storm's is one), and what the guest came to.
"""

from __future__ import annotations

import json
import sys
from time import process_time_ns
from typing import TYPE_CHECKING

import anyio

from mmunotify.model import Machine
from mmunotify_kvm.vm import VirtualMachine
from swap_storm import FULL, run_process

from ._bench import bare_calls

if TYPE_CHECKING:
    import mmunotify as mn
    from mmunotify_kvm.vcpu import VCpu

PAGE = 4096
CALLS = 2000


async def run_guest(machine: Machine[mn.RwSems], vcpu: VCpu, pages: int, loops: int) -> None:
    for _ in range(loops):
        for gfn in range(pages):
            await vcpu.store(gfn * PAGE, b"")
            await machine.cond_resched(1)


async def storm(pages: int, loops: int) -> dict[str, int]:
    """Guest and process of `pages` pages each, on three quarters as many frames."""
    async with Machine(frames=pages // 4 * 3, swap=2 * pages) as machine:
        guest = machine.new_mm("guest")
        vm = VirtualMachine()
        async with guest.attached(vm):
            base = await guest.mmap(pages * PAGE)
            await vm.set_user_memory_region(0, 0, pages * PAGE, base)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run_guest, machine, vm.vcpus[0], pages, loops)
                tasks.start_soon(run_process, machine.new_mm("process"), pages, loops)
            # The guest is where it should be, and so is every page of its memory.
            assert vm.counters["faults"] >= vm.counters["installed"] >= pages * loops // 2
            assert vm.pages_4k == vm.counters["installed"] - vm.counters["mapped"]
            assert (vm.active, vm.mmu.invalidate_in_progress) == (0, 0)
        await guest.exit()
        assert machine.swap.used == 0
        return dict(vm.counters)


async def measure(pages: int, loops: int) -> dict[str, float]:
    calls = taken_by_calls = 0
    done: list[dict[str, int]] = []

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
        done.append(await storm(pages, loops))
    taken = process_time_ns() - began - taken_by_calls
    touched = 2 * pages * loops
    return {"calls_per_page": taken / touched / (taken_by_calls / calls), **done[0]}


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else FULL
    print(json.dumps(anyio.run(measure, size, 2)))
