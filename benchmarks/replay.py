"""How fast recordings are replayed: recorded wall time over replay time, 1 for "as fast as it was".

The recordings that ship with the project, and those of the directory MMUNOTIFY_RECORDINGS. The
limits hold for the geometric means over the eight recordings that the project is measured with, of
which two ship.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import anyio

from mmunotify.cli.choices import choose
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Design, Replay

from ._bench import Row, at_least, printed

SHIPPED = Path(__file__).parent.parent / "tests" / "data" / "traces"
DRIVERS = ("kvm", "gru", "xpmem")
ROUNDS = 3
SECONDS = 5.0
"""Each recording is replayed so often, and for so long: one replay takes from 0.2 s on."""


def paths() -> list[Path]:
    directory = os.environ.get("MMUNOTIFY_RECORDINGS")
    found = {path.name: path for path in SHIPPED.glob("*.mmt.xz")}
    if directory is not None:
        found |= {path.name: path for path in Path(directory).glob("*.mmt.xz")}
    return [found[name] for name in sorted(found)]


def ratio(path: Path, drivers: tuple[str, ...]) -> float:
    """The best of some replays, parsing included."""
    best = spent = 0.0
    rounds = 0
    while rounds < ROUNDS or spent < SECONDS:
        replay = Replay(Recording(path), Design(tuple(map(choose, drivers))))
        anyio.run(replay.run)
        best = max(best, replay.recorded_seconds / replay.replay_seconds)
        spent += replay.replay_seconds
        rounds += 1
    return best


def run() -> list[Row]:
    rows: list[Row] = []
    against = "recorded time"
    for label, drivers, least, mean in (
        ("three drivers", DRIVERS, 1 / 6, 1.0),
        ("no driver", (), 0.0, 4.0),
    ):
        ratios = {path.name.removesuffix(".mmt.xz"): ratio(path, drivers) for path in paths()}
        rows += [
            at_least(f"{name}, {label}", found, round(least, 3), against)
            for name, found in ratios.items()
        ]
        geometric = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        arithmetic = sum(ratios.values()) / len(ratios)
        rows.append(at_least(f"geometric mean, {label}", geometric, mean, against))
        rows.append(printed(f"arithmetic mean, {label}", arithmetic, against))
    return rows
