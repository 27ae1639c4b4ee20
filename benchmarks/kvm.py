"""The kvm driver: page faults and notifications in calls, a zap against numpy, and a swap storm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify_kvm.driver import KvmDriver
from mmunotify_kvm.options import KvmOptions
from mmunotify_kvm.spte import DIRTY
from mmunotify_kvm.vm import VirtualMachine

from ._bench import Row, at_most, bare_calls, minima, undisturbed

if TYPE_CHECKING:
    import numpy.typing as npt

PAGE = mn.PAGE_SIZE
PAGES = 1 << 12
TWO_GIB = 1 << 19
ROUNDS = 30
ZAPS = 7
ROOT = Path(__file__).parent.parent


def a_call() -> float:
    """Nanoseconds of a bare call, in the middle of what is measured with it."""
    (taken,) = minima(bare_calls, rounds=50)
    return taken


async def faults(step: int, **options: Any) -> float:
    """Nanoseconds of a guest's load that faults on what its host has; every `step`th page."""
    async with Machine(frames=2 * PAGES, swap=0) as machine:
        mm = machine.new_mm()
        vm = VirtualMachine(KvmOptions(**options))
        async with mm.attached(vm):
            base = await mm.mmap(PAGES * PAGE)
            await mm.touch(base, PAGES * PAGE, write=True)
            await vm.set_user_memory_region(0, 0, PAGES * PAGE, base)
            load = vm.vcpus[0].load
            best = float("inf")
            with undisturbed():
                for _ in range(ROUNDS):
                    began = perf_counter_ns()
                    for address in range(0, PAGES * PAGE, step * PAGE):
                        await load(address, 1)
                    best = min(best, perf_counter_ns() - began)
                    assert vm.zap_all() == PAGES
            return best / (PAGES // step)


async def notifications() -> tuple[float, float]:
    """Nanoseconds of a start and an end that meet none of 64 memslots; of a device's access."""
    async with Machine(frames=1024, swap=0) as machine:
        mm = machine.new_mm()
        vm = KvmDriver(KvmOptions(vcpus=4))
        async with mm.attached(vm):
            base = await mm.mmap(128 * PAGE)
            for slot in range(64):
                await vm.set_user_memory_region(
                    slot + 1000, base + 2 * slot * PAGE, PAGE, base + 2 * slot * PAGE
                )
            rng = mn.Range(base + 65 * PAGE, base + 66 * PAGE, mn.Event.CLEAR)
            start, end = vm.invalidate_range_start, vm.invalidate_range_end
            for _ in range(8):
                if not vm.access(base, write=True):
                    await vm.fault(base, write=True)
            access = vm.access

            def notify(number: int) -> None:
                for _ in range(number):
                    start(rng)
                    end(rng)

            def use(number: int) -> None:
                for _ in range(number):
                    access(base, write=True)

            taken = minima(notify, use)
            assert not vm.counters["zaps"]
            return taken[0], taken[1]


async def zap() -> tuple[float, float]:
    """Nanoseconds of taking 2 GiB of written memory from a guest; of finding and clearing it."""
    async with Machine(frames=TWO_GIB + 4096, swap=0) as machine:
        mm = machine.new_mm()
        vm = VirtualMachine(KvmOptions(dirty="zap"))
        async with mm.attached(vm):
            base = await mm.mmap(TWO_GIB * PAGE)
            await mm.touch(base, TWO_GIB * PAGE, write=True)
            await vm.set_user_memory_region(0, 0, TWO_GIB * PAGE, base)
            rng = mn.Range(base, base + TWO_GIB * PAGE)
            column = vm.memslots.by_id[0].table.leaf_column
            dirty = np.uint64(DIRTY)
            zapped = cleared = float("inf")
            for _ in range(ZAPS):
                await vm.pre_fault_memory(0, TWO_GIB * PAGE)
                column |= dirty
                peer = column.copy()
                with undisturbed():
                    began = perf_counter_ns()
                    vm.invalidate_range_start(rng)
                    vm.invalidate_range_end(rng)
                    zapped = min(zapped, perf_counter_ns() - began)
                    began = perf_counter_ns()
                    find_and_clear(peer)
                    cleared = min(cleared, perf_counter_ns() - began)
            assert vm.counters["mapped"] == ZAPS * TWO_GIB
            return zapped, cleared


def find_and_clear(column: npt.NDArray[np.uint64]) -> None:
    column[np.flatnonzero(column)] = 0


def storm() -> list[Row]:
    path = os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._kvm_storm"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    return [
        at_most("swap storm, per page touched", found["calls_per_page"], 350, "a call", "calls")
    ]


def run() -> list[Row]:
    rows: list[Row] = []
    taken = anyio.run(lambda: faults(1)) / a_call()
    rows.append(at_most("guest fault", taken, 400, "a call", "calls"))
    taken = anyio.run(lambda: faults(8, mmu="shadow")) / a_call()
    rows.append(at_most("guest fault, per page of 8", taken / 8, 400, "a call", "calls"))
    missed, used = anyio.run(notifications)
    rows.append(at_most("notification, no memslot", missed / a_call(), 80, "a call", "calls"))
    rows.append(at_most("device access, hit", used / a_call(), 40, "a call", "calls"))
    zapped, cleared = anyio.run(zap)
    rows.append(at_most("zap of 2 GiB, all dirty", zapped / cleared, 10, "numpy: find and clear"))
    return [*rows, *storm()]
