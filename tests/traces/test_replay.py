"""The replay: who did what in a recording, done to the model, and compared with the kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from mmunotify import AtomicDriver, RwSems, SleepableDriver, SpinLocks
from mmunotify.traces.devices import AtomicTlb
from mmunotify.traces.figures import figures
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Choice, Design, Replay
from mmunotify.traces.touching import Touching

if TYPE_CHECKING:
    from mmunotify import Range

DATA = Path(__file__).parent.parent / "data" / "traces"
HEADER = {"cmd": ["prog"], "vm": True, "wall_ms": 3, "root": 7, "lost": [0, 0]}
BASE = 0x7F00_0000_0000

# execve of a small program: text, a page of data, the stack; then its VM exists.
START = f"""\
9 > 7 execve{" "}
1 m 7 aa 1 4096
1 o 7 7ffc00000000 7ffc00021000 rw-p 0 0 [stack]
1 o 7 550000000000 550000002000 r-xp 0 11 /bin/prog
1 o 7 550000002000 550000004000 rw-p 2000 11 /bin/prog
1 x 7 prog
1 < 7 execve 0
1 v 7 S 550000000000 550000002000 r-xp 00000000 11 /bin/prog
"""


def mapped(tid: int = 7, pages: int = 8, at: int = BASE) -> str:
    """A private anonymous mapping, every page of it written."""
    size = pages << 12
    writes = "".join(f"1 f {tid} {at + (page << 12):x} 99 6\n" for page in range(pages))
    return (
        f"1 > {tid} mmap 0 {size:x} 3 22 ffffffff 0\n"
        f"1 o {tid} {at:x} {at + size:x} rw-p 0 0 //anon\n"
        f"1 < {tid} mmap {at:x}\n{writes}"
    )


def forked(child: int = 8, *, announced: tuple[tuple[int, int], ...] = ()) -> str:
    """Task 7 forks; `announced` are the ranges that it heard of."""
    told = "".join(f"1 u 7 {start:x} {end:x}\n1 m 7 bb 1 4096\n" for start, end in announced)
    return (
        f"1 > 7 clone 1200011 0 0 0 0\n{told}1 n 7 {child} 1200000\n1 < 7 clone {child:x}\n"
        f"1 < {child} clone 0\n"
    )


STACK_FORKED = (0x7FFC_0000_0000, 0x7FFC_0002_1000)
DATA_FORKED = (BASE, BASE + 0x8000)


def replay(tmp_path: Path, text: str, design: Design | None = None) -> Replay:
    """A replay of these lines, to be run."""
    path = tmp_path / "prog.mmt"
    fields = {**HEADER, "events": text.count("\n")}
    path.write_text(f"#{json.dumps(fields)}\n{text}")
    return Replay(Recording(path), design or Design())


async def counts(found: Replay) -> tuple[int, int, int]:
    """Run it: what the kernel announced, what of that was matched, and what the model added."""
    await found.run()
    assert found.unexplained == {}
    return found.matches.kernel, found.matches.matched, found.matches.extra


async def test_munmap_is_announced_as_recorded(tmp_path: Path) -> None:
    text = START + mapped() + f"1 > 7 munmap {BASE:x} 4000\n1 u 7 {BASE:x} {BASE + 0x4000:x}\n"
    assert await counts(replay(tmp_path, text + "1 < 7 munmap 0\n")) == (1, 1, 0)


async def test_another_range_is_missing_here_and_surplus_there(tmp_path: Path) -> None:
    text = START + mapped() + f"1 > 7 munmap {BASE:x} 4000\n1 u 7 {BASE:x} {BASE + 0x3000:x}\n"
    found = replay(tmp_path, text + "1 < 7 munmap 0\n")
    assert await counts(found) == (1, 0, 1)
    assert found.matches.missing == found.matches.surplus == {"munmap": 1}


async def test_what_happens_before_the_vm_exists_is_not_compared(tmp_path: Path) -> None:
    early = START.splitlines(keepends=True)[:-1]
    text = "".join(early) + mapped() + f"1 > 7 munmap {BASE:x} 4000\n1 < 7 munmap 0\n"
    assert await counts(replay(tmp_path, text)) == (0, 0, 0)


async def test_fork_and_copies_of_parent_and_child(tmp_path: Path) -> None:
    """The child's faults count from its own VM on, and are compared per address space."""
    text = START + mapped() + forked(announced=(DATA_FORKED, STACK_FORKED))
    text += f"1 f 7 {BASE:x} 99 7\n1 u 7 {BASE:x} {BASE + 0x1000:x}\n"
    text += f"1 f 8 {BASE:x} 99 7\n"  # the last owner reuses the page, silently
    text += f"1 v 8 F {BASE:x} {BASE + 0x8000:x} rw-p 00000000 0 \n"
    text += f"1 f 8 {BASE + 0x1000:x} 99 7\n1 u 8 {BASE + 0x1000:x} {BASE + 0x2000:x}\n"
    assert await counts(replay(tmp_path, text + "1 e 8\n1 e 7\n")) == (4, 4, 0)


async def test_order_matters(tmp_path: Path) -> None:
    text = START + mapped() + forked(announced=(STACK_FORKED, DATA_FORKED))
    assert await counts(replay(tmp_path, text)) == (2, 1, 1)


async def test_threads_share_memory_until_the_last_is_gone(tmp_path: Path) -> None:
    text = START + "1 > 7 clone3 1 58\n1 n 7 9 3d0f00\n1 < 7 clone3 9\n" + mapped(9) + "1 e 9\n"
    text += f"1 > 7 munmap {BASE:x} 8000\n1 u 7 {BASE:x} {BASE + 0x8000:x}\n1 < 7 munmap 0\n1 e 7\n"
    assert await counts(replay(tmp_path, text)) == (1, 1, 0)


async def test_fault_that_waits_for_a_fork_copies_after_it(tmp_path: Path) -> None:
    """Recorded at its beginning, before it had to wait for mmap_lock."""
    text = START + mapped() + "1 > 7 clone3 1 58\n1 n 7 9 3d0f00\n1 < 7 clone3 9\n"
    text += f"1 > 7 clone 1200011 0 0 0 0\n1 u 7 {BASE:x} {BASE + 0x8000:x}\n"
    text += f"1 f 9 {BASE:x} 99 7\n1 u 7 {STACK_FORKED[0]:x} {STACK_FORKED[1]:x}\n"
    text += f"1 n 7 8 1200000\n1 u 9 {BASE:x} {BASE + 0x1000:x}\n1 < 7 clone 8\n"
    assert await counts(replay(tmp_path, text)) == (3, 3, 0)


async def test_vforked_child_borrows_memory_until_it_execs(tmp_path: Path) -> None:
    text = START + mapped() + "1 > 7 vfork\n1 n 7 8 4100\n1 > 8 execve \n1 m 8 cc 1 4096\n"
    text += "1 o 8 7ffd00000000 7ffd00021000 rw-p 0 0 [stack]\n1 x 8 other\n1 < 8 execve 0\n"
    text += "1 < 7 vfork 8\n1 v 8 S 7ffd00000000 7ffd00021000 rw-p 00000000 0 [stack]\n"
    text += mapped(8) + f"1 > 8 munmap {BASE:x} 8000\n1 u 8 {BASE:x} {BASE + 0x8000:x}\n"
    text += "1 < 8 munmap 0\n1 e 8\n"
    text += f"1 > 7 munmap {BASE:x} 8000\n1 u 7 {BASE:x} {BASE + 0x8000:x}\n1 < 7 munmap 0\n"
    assert await counts(replay(tmp_path, text)) == (2, 2, 0)


async def test_execve_that_fails_leaves_everything(tmp_path: Path) -> None:
    text = START + mapped() + "1 > 7 execve \n1 < 7 execve fffffffffffffffe\n"
    text += f"1 > 7 munmap {BASE:x} 8000\n1 u 7 {BASE:x} {BASE + 0x8000:x}\n1 < 7 munmap 0\n"
    assert await counts(replay(tmp_path, text)) == (1, 1, 0)


async def test_reclaim_by_another_task_is_given_to_the_named_owner(tmp_path: Path) -> None:
    """In neither figure; and the page is gone: coming back from swap is silent."""
    told: list[tuple[int, int]] = []

    class Listener(AtomicDriver):
        def invalidate_range_start(self, rng: Range) -> None:
            told.append((rng.start, rng.end))

    page = f"{BASE:x} {BASE + 0x1000:x}"
    text = START + mapped() + forked(announced=(DATA_FORKED, STACK_FORKED))
    text += f"1 > 8 execve \n1 m 8 cc 1 4096\n1 o 8 {BASE:x} {BASE + 0x1000:x} rw-p 0 0 [stack]\n"
    text += f"1 < 8 execve 0\n1 f 8 {BASE:x} 99 6\n1 e 8\n"
    text += f"1 a 99 {page}\n1 u 99 {page}\n1 m 99 aa 1 4096\n1 f 7 {BASE:x} 99 6\n"
    found = replay(tmp_path, text, Design((Choice("listener", AtomicDriver, Listener),)))
    assert await counts(found) == (2, 2, 0)
    assert (found.given, found.aged) == (1, 1)
    assert told[-1] == (BASE, BASE + 0x1000)


async def test_reclaim_of_the_faulting_tasks_own_pages_is_given_too(tmp_path: Path) -> None:
    page = f"{BASE:x} {BASE + 0x1000:x}"
    text = START + mapped() + f"1 f 7 {BASE + 0x3000:x} 99 6\n1 a 7 {page}\n1 u 7 {page}\n"
    found = replay(tmp_path, text)
    assert await counts(found) == (0, 0, 0)
    assert found.given == 1


async def test_pages_that_write_dirtied_are_known_from_their_writeback(tmp_path: Path) -> None:
    text = START + "1 > 7 openat 1 2 3\n1 < 7 openat 3\n1 > 7 mmap 0 4000 1 1 3 0\n"
    text += f"1 o 7 {BASE:x} {BASE + 0x4000:x} r--s 0 12 /tmp/db\n1 < 7 mmap {BASE:x}\n"
    text += f"1 f 7 {BASE:x} 99 4\n1 > 7 fdatasync 3\n"
    text += f"1 u 7 {BASE + 0x1000:x} {BASE + 0x2000:x}\n1 < 7 fdatasync 0\n"
    found = replay(tmp_path, text)
    assert await counts(found) == (1, 1, 0)
    assert found.inferred == 1


async def test_pages_written_through_a_mapping_need_no_such_help(tmp_path: Path) -> None:
    text = START + "1 > 7 openat 1 2 3\n1 < 7 openat 3\n1 > 7 mmap 0 4000 3 1 3 0\n"
    text += f"1 o 7 {BASE:x} {BASE + 0x4000:x} rw-s 0 12 /tmp/db\n1 < 7 mmap {BASE:x}\n"
    text += f"1 f 7 {BASE:x} 99 6\n1 > 7 fsync 3\n1 < 7 fsync 0\n"
    assert await counts(replay(tmp_path, text)) == (0, 0, 1)


async def test_failed_call_announces_what_it_did_first(tmp_path: Path) -> None:
    """mprotect over a hole."""
    text = START + mapped() + f"1 > 7 mprotect {BASE:x} 9000 1\n"
    text += f"1 u 7 {BASE:x} {BASE + 0x8000:x}\n1 < 7 mprotect fffffffffffffff4\n"
    assert await counts(replay(tmp_path, text)) == (1, 1, 0)


async def test_what_the_model_cannot_do_is_named(tmp_path: Path) -> None:
    text = START + "1 > 7 mprotect 1000 1000 1\n1 < 7 mprotect 0\n"
    text += f"1 > 7 munmap {BASE:x} 1000\n1 < 7 munmap ffffffffffffffea\n"
    found = replay(tmp_path, text)
    await found.run()
    mprotect, munmap = found.unexplained
    assert mprotect.startswith("mprotect(0x1000, 0x1000, 0x1): ")
    assert munmap == f"munmap({BASE:#x}, 0x1000) failed with EINVAL when it was recorded"


async def test_access_that_a_signal_answers_is_counted(tmp_path: Path) -> None:
    found = replay(tmp_path, START + "1 f 7 5000 99 4\n")
    assert await counts(found) == (0, 0, 0)
    assert found.signals == 1


async def test_events_of_a_task_that_nobody_cloned_are_named(tmp_path: Path) -> None:
    found = replay(tmp_path, START + "1 f 55 1000 99 4\n1 > 55 brk 0\n1 < 55 brk 0\n")
    await found.run()
    assert sum(found.unexplained.values()) == 2


async def test_runs_of_faults_are_the_same_as_single_ones(tmp_path: Path) -> None:
    text = START + mapped(pages=64)
    found = replay(tmp_path, text)
    await found.run()
    assert found.events == text.count("\n")


@pytest.mark.parametrize("device", ["same", "hot:8", "random:1"])
async def test_devices_hold_what_invalidations_then_find(tmp_path: Path, device: str) -> None:
    text = START + mapped() + f"1 > 7 munmap {BASE:x} 8000\n1 u 7 {BASE:x} {BASE + 0x8000:x}\n"
    design = Design((Choice("tlb", AtomicDriver, AtomicTlb),), touching=Touching.parse(device))
    found = replay(tmp_path, text + "1 < 7 munmap 0\n", design)
    assert await counts(found) == (1, 1, 0)
    (row,) = figures(found)["drivers"]
    assert row["callbacks"]["invalidate_range_start"] == 1
    assert row["pages"] == 8
    assert 0 < row["mapped"] <= row["installed"] <= 8
    assert row["mapped"] == 8 or device == "hot:8"


async def test_program_goes_on_as_recorded_whatever_devices_do(tmp_path: Path) -> None:
    """A device's write never breaks copy on write, which the kernel would have announced."""
    text = START + mapped() + forked(announced=(DATA_FORKED, STACK_FORKED))
    text += f"1 f 7 {BASE:x} 99 7\n1 u 7 {BASE:x} {BASE + 0x1000:x}\n"
    text += "".join(f"1 f 7 {0x7FFC_0001_0000 + (page << 12):x} 99 6\n" for page in range(16))
    design = Design((Choice("tlb", AtomicDriver, AtomicTlb),), touching=Touching.parse("hot:64"))
    assert await counts(replay(tmp_path, text, design)) == (3, 3, 0)


async def test_shipped_recording_matches_the_kernel() -> None:
    found = Replay(Recording(DATA / "sqlite.mmt.xz"), Design())
    kernel, matched, extra = await counts(found)
    assert (kernel, found.given) == (11197, 0)
    assert matched >= 0.99 * kernel
    assert extra <= 0.01 * kernel
    assert found.recorded_seconds == pytest.approx(0.675767)


def test_long_recording_with_many_processes_matches_the_kernel() -> None:
    found = Replay(Recording(DATA / "redis.mmt.xz"), Design())
    kernel, matched, extra = anyio.run(counts, found)
    assert (kernel, found.aged) == (5743, 853)
    assert matched >= 0.99 * kernel
    assert extra <= 0.01 * kernel


async def test_truncated_recording_is_replayed_up_to_where_it_ends(tmp_path: Path) -> None:
    whole = (DATA / "sqlite.mmt.xz").read_bytes()
    path = tmp_path / "cut.mmt.xz"
    path.write_bytes(whole[: len(whole) // 2])
    found = Replay(Recording(path), Design())
    kernel, matched, _ = await counts(found)
    assert figures(found)["truncated"]
    assert 0 < found.events < 14676
    assert 0 < matched <= kernel < 11197


async def test_stopped_replay_leaves_its_figures(tmp_path: Path) -> None:
    found = Replay(Recording(DATA / "redis.mmt.xz"), Design())

    def stop(replay: Replay) -> None:
        replay.stopped = True

    await found.run(stop)
    assert 0 < found.events < 73093
    assert figures(found)["stopped"]


def test_impossible_designs_say_why() -> None:
    sleepable = (Choice("sleeper", SleepableDriver, SleepableDriver),)
    assert Design(sleepable, RwSems, "range").impossible() is None
    assert Design(sleepable, RwSems, "gather").impossible() is None
    assert "under spinlocks" in (Design(sleepable, SpinLocks, "range").impossible() or "")
    assert "page is told under" in (Design(sleepable, RwSems, "page").impossible() or "")
    assert Design((Choice("a", AtomicDriver, AtomicTlb),), SpinLocks, "page").impossible() is None


@pytest.mark.parametrize(
    "call",
    [
        f"mmap 0 8000 3 22 ffffffff 0\n1 < 7 mmap {2**64 - 12:x}",
        f"mmap {BASE:x} 8000 3 100022 ffffffff 0\n1 < 7 mmap {2**64 - 17:x}",
        f"mprotect {BASE:x} 1000 7\n1 < 7 mprotect {2**64 - 13:x}",
        f"madvise {BASE:x} 1000 dead\n1 < 7 madvise {2**64 - 22:x}",
        f"madvise {BASE:x} 1000 19\n1 < 7 madvise {2**64 - 22:x}",
        f"mlock {BASE:x} 1000\n1 < 7 mlock {2**64 - 1:x}",
        f"mremap {BASE:x} 8000 10000 0\n1 < 7 mremap {2**64 - 12:x}",
        f"ftruncate 0 5\n1 < 7 ftruncate {2**64 - 22:x}",
        f"fallocate 5 0 0 5\n1 < 7 fallocate {2**64 - 95:x}",
        f"fsync 1\n1 < 7 fsync {2**64 - 22:x}",
        f"shmat 3 0 0\n1 < 7 shmat {2**64 - 22:x}",
    ],
)
async def test_what_the_kernel_refused_leaves_everything(tmp_path: Path, call: str) -> None:
    text = START + mapped() + f"1 > 7 {call}\n1 > 7 munmap {BASE:x} 8000\n"
    text += f"1 u 7 {BASE:x} {BASE + 0x8000:x}\n1 < 7 munmap 0\n"
    assert await counts(replay(tmp_path, text)) == (1, 1, 0)


async def test_mapping_that_was_made_and_taken_back_is_announced(tmp_path: Path) -> None:
    """mmap with huge pages of which there are not enough."""
    text = START + "1 > 7 mmap 0 400000 3 40021 ffffffff 0\n"
    text += f"1 u 7 {BASE:x} {BASE + 0x400000:x}\n1 < 7 mmap {2**64 - 12:x}\n"
    found = replay(tmp_path, text)
    assert await counts(found) == (1, 1, 0)


async def test_descriptors_are_shared_by_dup_and_gone_after_close(tmp_path: Path) -> None:
    """Which file it is, is known from the mapping; truncating the other descriptor is told, too."""
    text = START + "1 > 7 openat 1 2 3\n1 < 7 openat 3\n1 > 7 dup 3\n1 < 7 dup 4\n"
    text += f"1 > 7 mmap 0 4000 3 1 3 0\n1 o 7 {BASE:x} {BASE + 0x4000:x} rw-s 0 12 /tmp/db\n"
    text += f"1 < 7 mmap {BASE:x}\n1 f 7 {BASE + 0x3000:x} 99 6\n1 > 7 close 3\n1 < 7 close 0\n"
    text += "1 > 7 ftruncate 3 0\n1 < 7 ftruncate 0\n1 > 7 ftruncate 4 1000\n"
    text += 2 * f"1 u 7 {BASE + 0x1000:x} {BASE + 0x4000:x}\n"
    assert await counts(replay(tmp_path, text + "1 < 7 ftruncate 0\n")) == (2, 2, 0)


async def test_file_truncated_by_its_path_is_known_from_what_was_announced(tmp_path: Path) -> None:
    text = START + "1 > 7 openat 1 2 3\n1 < 7 openat 3\n"
    text += f"1 > 7 mmap 0 4000 3 1 3 0\n1 o 7 {BASE:x} {BASE + 0x4000:x} rw-s 0 12 /tmp/db\n"
    text += f"1 < 7 mmap {BASE:x}\n1 f 7 {BASE + 0x3000:x} 99 6\n1 > 7 truncate 99 1000\n"
    text += 2 * f"1 u 7 {BASE + 0x1000:x} {BASE + 0x4000:x}\n"
    assert await counts(replay(tmp_path, text + "1 < 7 truncate 0\n")) == (2, 2, 0)


async def test_thread_that_executes_a_program_becomes_the_leader(tmp_path: Path) -> None:
    text = START + mapped() + "1 > 7 clone3 1 58\n1 n 7 9 3d0f00\n1 < 7 clone3 9\n"
    text += "1 > 9 execve \n1 e 7\n1 o 7 7ffd00000000 7ffd00021000 rw-p 0 0 [stack]\n"
    text += "1 x 7 other\n1 < 7 execve 0\n1 v 7 S 7ffd00000000 7ffd00021000 rw-p 0 0 [stack]\n"
    text += mapped() + f"1 > 7 munmap {BASE:x} 8000\n1 u 7 {BASE:x} {BASE + 0x8000:x}\n"
    found = replay(tmp_path, text + "1 < 7 munmap 0\n1 e 7\n")
    assert await counts(found) == (1, 1, 0)
    assert found.signals == 0


async def test_number_of_a_task_can_be_used_again(tmp_path: Path) -> None:
    told = (DATA_FORKED, STACK_FORKED)
    text = START + mapped() + forked(announced=told) + "1 e 8\n" + forked(announced=told)
    text += f"1 v 8 F {BASE:x} {BASE + 0x8000:x} rw-p 0 0 \n1 > 8 munmap {BASE:x} 8000\n"
    text += f"1 u 8 {BASE:x} {BASE + 0x8000:x}\n1 < 8 munmap 0\n1 e 8\n"
    assert await counts(replay(tmp_path, text)) == (5, 5, 0)


async def test_lost_events_are_not_an_error_and_are_shown(tmp_path: Path) -> None:
    """Of a clone, say: its task is nobody's, and that is named."""
    text = START + f"1 f 12 {BASE:x} 99 6\n1 u 12 {BASE:x} {BASE + 0x1000:x}\n1 e 12\n1 e 7\n"
    path = tmp_path / "prog.mmt"
    path.write_text(
        f"#{json.dumps({**HEADER, 'lost': [1, 2], 'events': text.count(chr(10))})}\n{text}"
    )
    found = Replay(Recording(path), Design())
    await found.run()
    assert figures(found)["lost"] == 3
    assert sum(found.unexplained.values()) == 1
