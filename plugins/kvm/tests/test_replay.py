"""The machine in a replay: the memory of its guest is a part of the recorded program's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import mmunotify as mn
from mmunotify.traces.figures import figures
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Choice, Design, Replay
from mmunotify.traces.touching import Touching
from mmunotify_kvm import DRIVER

if TYPE_CHECKING:
    from pathlib import Path

BASE = 0x7F00_0000_0000
PAGES = 64


def recorded(path: Path) -> Recording:
    """A hypervisor: it maps its guest's memory, which faults on half of it; then a part goes."""
    size = PAGES << 12
    guest = "".join(f"1 g 7 {gfn << 12:x} 2\n" for gfn in range(0, PAGES, 2))
    text = (
        "9 > 7 execve \n1 m 7 aa 1 4096\n"
        "1 o 7 7ffc00000000 7ffc00021000 rw-p 0 0 [stack]\n1 x 7 prog\n1 < 7 execve 0\n"
        "1 v 7 S 7ffc00000000 7ffc00021000 rw-p 00000000 0 [stack]\n"
        f"1 > 7 mmap 0 {size:x} 3 22 ffffffff 0\n"
        f"1 o 7 {BASE:x} {BASE + size:x} rw-p 0 0 //anon\n1 < 7 mmap {BASE:x}\n"
        f"{guest}1 > 7 madvise {BASE:x} 4000 4\n1 u 7 {BASE:x} {BASE + 0x4000:x}\n1 < 7 madvise 0\n"
    )
    fields = {"cmd": ["vmm"], "vm": True, "wall_ms": 3, "root": 7, "lost": [0, 0]}
    path.write_text(f"#{json.dumps({**fields, 'events': text.count(chr(10))})}\n{text}")
    return Recording(path)


async def test_a_recorded_guest_faults_in_this_machine(tmp_path: Path) -> None:
    """What the recorded guest used is mapped, and dropped when the program gives it up."""
    registry = mn.Registry.for_testing([DRIVER])
    choice = Choice("kvm", mn.AtomicDriver, lambda: registry.create("kvm", vcpus=2))
    replay = Replay(recorded(tmp_path / "vmm.mmt"), Design((choice,), touching=Touching("same")))
    await replay.run()
    assert replay.unexplained == {}
    assert (replay.matches.kernel, replay.matches.matched, replay.matches.extra) == (1, 1, 0)
    (row,) = figures(replay)["drivers"]
    assert (row["installed"], row["mapped"], row["flushes"]) == (PAGES // 2, 2, 1)
