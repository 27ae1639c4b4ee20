"""`mmunotify record`: a program's memory, as the kernel saw it, in a file that can be replayed."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from mmunotify.errors import RecorderError
from mmunotify.traces.record import residue
from mmunotify.traces.record.fallback import PRICE, record_with_strace
from mmunotify.traces.record.means import kernel_route
from mmunotify.traces.record.recorder import Recorder
from mmunotify.traces.record.tracefs import TraceFs

if TYPE_CHECKING:
    from rich.status import Status

    from mmunotify.traces.record.means import Means
    from mmunotify.traces.record.recorder import Outcome, Progress


def record(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    buffer: int | None = None,
    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"), negative="")] = False,
    cleanup: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Run a command, and record what it and its children do to their memory.

    As root, with tracefs: system calls on memory, page faults, forks and execs; with /dev/kvm also
    what the kernel announces to its MMU notifiers. What is missing is said, and what it costs. The
    recording ends when all processes have; Ctrl-C ends it earlier.

    The exit status is the command's.

    Parameters
    ----------
    command
        What to run; after `--` if it has options.
    output
        The recording to write; compressed if its name ends in .xz.
    buffer
        MiB of kernel memory per processor and ring, of which there are two, for what happens while
        nobody can read. By default 32, and less where that would be more than 1 GiB.
    quiet
        Show no counters while it runs.
    cleanup
        Instead of recording: remove what recorders have left that were killed.
    """
    if cleanup:
        if command or output:
            raise RecorderError("--cleanup: expected no command and no output beside it")
        return _clean_up()
    if not command:
        raise RecorderError("expected a command: mmunotify record -o FILE -- COMMAND...")
    if output is None:
        raise RecorderError("expected -o FILE: where to write the recording")
    if buffer is not None and buffer < 1:
        raise RecorderError(f"--buffer {buffer}: expected at least 1 MiB")
    size = buffer or max(4, min(32, 512 // (os.cpu_count() or 1)))
    console = Console(stderr=True)
    counters = console.status("starting")
    with ExitStack() as stack:
        means = _means(stack)
        if console.is_terminal and not quiet:
            stack.enter_context(counters)
        show = partial(_show, counters)
        if means is None:
            outcome = record_with_strace(command, output, show)
        else:
            outcome = Recorder(command, output, means, show).record(buffer_mib=size)
    _sum_up(output, outcome)
    return outcome.status


def _means(stack: ExitStack) -> Means | None:
    """What the kernel offers, and a line for what it does not; None: nothing."""
    try:
        means = kernel_route(stack, _say)
    except RecorderError as error:
        _say(f"{error}: {PRICE}")
        return None
    for pid in residue.recorders(means.tracefs.instances()):
        _say(f"process {pid} is recording too: each slows the other down")
    if any(residue.orphans(means.tracefs)):
        _say("a recorder was killed: `mmunotify record --cleanup` removes what it has left")
    return means


def _say(line: str) -> None:
    print(f"mmunotify record: {line}", file=sys.stderr, flush=True)


def _show(counters: Status, now: Progress) -> None:
    names = ("events", "announcements and counters")
    counts = [f"{count:,} {name}" for count, name in zip(now.events, names, strict=False)]
    counts.append(f"{now.copied >> 20:,} MiB")
    counts.append(f"{now.lost:,} lost")
    if now.written is not None:
        counts.append(f"{now.written:,} lines written")
    counters.update(f"{now.seconds:.1f} s: {', '.join(counts)}")


def _sum_up(output: Path, outcome: Outcome) -> None:
    _say(f"{output}: {outcome.events:,} events of {outcome.processes:,} processes")
    if sum(outcome.lost):
        _say(f"{sum(outcome.lost):,} events were lost: record again with a larger --buffer")
    for path, reason, count in outcome.unobserved:
        _say(f"{count} x {path}: announcements are missing ({reason})")
    if outcome.running is not None:
        _say(
            f"the command (process {outcome.running}) still runs, and is no longer recorded; "
            "when it has ended, `mmunotify record --cleanup` removes what it has been lent"
        )


def _clean_up() -> int:
    with ExitStack() as stack:
        try:
            tracefs = stack.enter_context(TraceFs())
        except RecorderError:
            tracefs = None
        removed = residue.remove(tracefs)
    for name in removed:
        _say(f"removed {name}")
    if not removed:
        _say("nothing to remove")
    return 0
