"""The stress of 2008, small and at full size; and large operations that let others run."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify.model.invariants import InvariantChecker
from swap_storm import FULL, ShadowPageTable, machine_for, swap_storm

if TYPE_CHECKING:
    from mmunotify.model import AddressSpace

STORM = Path(__file__).parents[2] / "examples" / "swap_storm.py"
PAGES = 1 << 10
LARGE = 2 << 30
STEP = 4096


async def test_guest_in_swap_uses_no_translation_that_it_has_lost() -> None:
    """Which would raise StaleTranslation; and it loses nearly all of them in every loop."""
    async with machine_for(PAGES) as machine:
        storm = await swap_storm(machine, PAGES, 3)
        assert storm.faults > 2 * PAGES
        assert storm.aged > storm.unmapped > PAGES
    assert machine.frames.used == 1
    assert machine.swap.used == 0


class Deaf(ShadowPageTable):
    """Does not hear of what it loses."""

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.open += 1


async def test_guest_that_does_not_listen_is_found_out() -> None:
    with pytest.RaisesGroup(mn.StaleTranslation, flatten_subgroups=True):
        async with machine_for(PAGES) as machine:
            await swap_storm(machine, PAGES, 3, Deaf)


async def test_storm_keeps_the_rules() -> None:
    pages = 1 << 7
    async with machine_for(pages) as machine:
        with InvariantChecker(machine) as checker:
            await swap_storm(machine, pages, 2)
        assert checker.step > pages


PEAK = """
import runpy, sys
runpy.run_path(sys.argv.pop(1), run_name="__main__")
print(open("/proc/self/status").read())
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read VmHWM from")
def test_storm_at_full_size_needs_little_memory() -> None:
    """2 GiB of guest and 2 GiB of process on 1.5 GiB of frames, in less than 150 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(STORM), "--full"],
        env={**os.environ, "MMUNOTIFY_LOCKDEP": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 150 << 10


# ---------------------------------------------------------------------- letting others run


@pytest.fixture
async def large() -> Any:
    """An address space with 2 GiB of frames to itself."""
    async with Machine(frames=FULL + 8192) as machine:
        yield machine.new_mm()


async def test_deadline_around_a_large_munmap_is_honoured(large: AddressSpace[mn.RwSems]) -> None:
    """It has passed, so the munmap raises; all is unmapped then, and nothing by halves."""
    heap = await large.mmap(LARGE)
    await large.touch(heap, LARGE, write=True)
    with anyio.CancelScope(deadline=anyio.current_time()) as scope:
        await large.munmap(heap, LARGE)
        pytest.fail("the munmap has not noticed")
    assert scope.cancelled_caught
    assert large.machine.frames.used == (1 if not large.vmas else 1 + FULL)


async def test_heart_beats_while_large_memory_is_touched_and_unmapped(
    large: AddressSpace[mn.RwSems],
) -> None:
    """Once per step of 4 096 pages, or of the next if the event loop takes it first."""
    beats = [0]

    async def heart() -> None:
        while True:
            beats.append(large.min_flt)
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heart)
        for _ in range(2):
            heap = await large.mmap(LARGE)
            await large.touch(heap, LARGE, write=True)
            before = len(beats)
            await large.munmap(heap, LARGE)
            await anyio.lowlevel.checkpoint()
            assert len(beats) > before
        tasks.cancel_scope.cancel()
    steps = [after - before for before, after in itertools.pairwise(beats)]
    assert max(steps) <= 2 * STEP
