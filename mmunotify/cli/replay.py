"""`mmunotify replay`: a recorded program, done again with drivers attached."""

from __future__ import annotations

import gc
import json as jsonlib
import signal
from contextlib import ExitStack, contextmanager
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import anyio
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mmunotify import RwSems, SpinLocks
from mmunotify.errors import DriverConfigError
from mmunotify.inspect.report import write_report
from mmunotify.traces.figures import figures
from mmunotify.traces.history import History
from mmunotify.traces.log import TraceLog
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Batching, Design, Era, Replay
from mmunotify.traces.touching import Touching

from .choices import choose

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cyclopts import Token

LOCKS: Final[dict[str, Any]] = {"spin": SpinLocks, "rwsem": RwSems}
HOT: Final = Touching("hot", pages=64)
INTERRUPTED: Final = 130
LABELS: Final = {
    "pages": "pages announced",
    "mapped": "really mapped",
    "flushes": "flushes",
    "installed": "translations made",
    "refaults": "refaults",
    "retries": "retries",
}
"""What the counters of a driver are called in a table."""


def touching(kind: object, tokens: Sequence[Token]) -> Touching:
    """Let cyclopts say whose value is wrong."""
    return Touching.parse(tokens[0].value)


DeviceOption: TypeAlias = Annotated[
    Touching, Parameter(converter=touching, accepts_keys=False, n_tokens=1)
]


def replay(
    *files: Annotated[Path, Parameter(required=True)],
    driver: Annotated[list[str] | None, Parameter(name="--driver", negative="")] = None,
    locks: Literal["spin", "rwsem"] = "rwsem",
    batching: Batching = "range",
    era: Era = "linux-6",
    device: DeviceOption = HOT,
    log: Path | None = None,
    report: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Replay recorded programs into the software model, and show what each driver was told.

    Ctrl-C ends the replay early; the log is whole, and the tables show what was done.

    Parameters
    ----------
    files
        Recordings (.mmt), plain or compressed with xz.
    driver
        Attach this driver to every address space: NAME[,option=value]...; may be repeated. NAME is
        a plugin (`mmunotify drivers list`), or atomic, sleepable or deferred: a plain translation
        cache of that colour.
    locks
        What protects the reverse maps: spinlocks, under which nobody may sleep, or rwsems.
    batching
        How unmapping is told: page by page, per 512 entries, when freed pages are gathered, or as
        a range before and after.
    era
        Whose callbacks are called: those of Linux 6, or those of the patches of 2008 (v16).
    device
        How the drivers' devices use memory: `same` (each page that the program faults on), `hot:N`
        (a Zipf working set of N pages) or `random:P` (each faulted page with probability P).
    log
        Write every section and callback here, as newline-delimited JSON.
    report
        Write an HTML page with tables and plots here; it opens without a network.
    json
        Print one JSON object per recording instead of tables.
    """
    design = Design(
        drivers=tuple(choose(text) for text in driver or ()),
        locks=LOCKS[locks],
        batching=batching,
        era=era,
        touching=device,
    )
    reason = design.impossible()
    if reason is not None:
        raise DriverConfigError(f"{reason}: choose other --locks or --batching")
    if report is not None:
        # That it cannot be written is better known now than at the end.
        report.open("a").close()
    console = Console()
    status = 0
    reported: list[dict[str, Any]] = []
    with ExitStack() as stack:
        trace = stack.enter_context(TraceLog(log)) if log is not None else None
        for path in files:
            recording = Recording(path)
            history = History(recording.header) if report is not None else None
            emit = trace.append if trace is not None else None
            done = Replay(recording, design, trace=emit, history=history)
            run(done, quiet=json)
            found = figures(done)
            if json:
                print(jsonlib.dumps(found), flush=True)
            else:
                show(console, found)
            if history is not None:
                reported.append({**found, "history": history.figures()})
            if done.stopped:
                status = INTERRUPTED
                break
    if report is not None:
        write_report(report, reported)
    return status


def run(replay: Replay, *, quiet: bool) -> None:
    """Run a replay to its end, or to the first Ctrl-C; the second one is the usual exception."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    task = progress.add_task(
        replay.recording.name, total=replay.recording.header.events, rate="", told=""
    )

    def advance(replay: Replay) -> None:
        speed = replay.events / max(replay.replay_seconds, 1e-9)
        told = " ".join(f"{meter.name} {sum(meter.calls.values())}" for meter in replay.meters)
        progress.update(task, completed=replay.events, rate=f"{speed:,.0f} events/s", told=told)

    # What is there by now stays, and collections need not look at it.
    gc.freeze()
    with progress, _interruptible(replay):
        anyio.run(replay.run, advance)


@contextmanager
def _interruptible(replay: Replay) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        replay.stopped = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------- tables


def show(console: Console, found: dict[str, Any]) -> None:
    """Print what a replay found: the headline, the drivers' table, and what did not match."""
    design = found["design"]
    console.print(Text(f"{found['recording']}: {found['command']}", style="bold"))
    words = f"{design['locks']} locks, {design['batching']} batching, {design['era']}"
    console.print(f"  {words}, devices {design['device']}")
    ratio = found["recorded_seconds"] / max(found["replay_seconds"], 1e-9)
    console.print(
        f"  {found['events']:,} events of {found['recorded_seconds']:.3f} s replayed in "
        f"{found['replay_seconds']:.3f} s ({ratio:.2f} times as fast as recorded)"
    )
    if found["truncated"] or found["stopped"]:
        why = "the file ends there" if found["truncated"] else "interrupted"
        console.print(f"  of {found['recorded_events']:,} events that were recorded: {why}")
    if found["lost"]:
        console.print(f"  {found['lost']:,} events were lost when it was recorded")
    if found["kernel_announcements"]:
        share = found["matched"] / found["kernel_announcements"]
        console.print(
            f"  the kernel announced {found['kernel_announcements']:,} ranges in calls and faults, "
            f"the model {found['matched']:,} of them ({share:.2%}) and {found['extra']:,} others"
        )
    notes = {"reclaimed by others": found["given"], "aged by others": found["aged"]}
    console.print(f"  given: {', '.join(f'{count:,} {what}' for what, count in notes.items())}")
    notes = {
        "found dirty only by their writeback": found["inferred"],
        "answered with a signal": found["signals"],
    }
    for what, count in notes.items():
        if count:
            console.print(f"  pages {what}: {count:,}")
    for name in ("missing", "surplus", "unexplained"):
        if found[name]:
            listed = "; ".join(f"{what}: {count:,}" for what, count in found[name].items())
            console.print(Text(f"  {name}: {listed}"))
    if found["drivers"]:
        console.print(driver_table(found["drivers"]))


def driver_table(drivers: list[dict[str, Any]]) -> Table:
    """One column per driver. A dash: the driver does not count it."""
    table = Table("", box=None, pad_edge=False)
    for row in drivers:
        table.add_column(f"{row['driver']} ({row['kind']})", justify="right")
    for name in sorted({name for row in drivers for name in row["callbacks"]}):
        table.add_row(name, *(f"{row['callbacks'].get(name, 0):,}" for row in drivers))
    for name, label in LABELS.items():
        numbers = ("-" if row[name] is None else f"{row[name]:,}" for row in drivers)
        table.add_row(label, *numbers)
    times = (f"{row['callback_seconds']:.3f} s" for row in drivers)
    table.add_row("time in callbacks", *times)
    for name in dict.fromkeys(name for row in drivers for name in row["counters"]):
        own = (row["counters"].get(name) for row in drivers)
        table.add_row(name, *("-" if count is None else f"{count:,}" for count in own))
    return table
