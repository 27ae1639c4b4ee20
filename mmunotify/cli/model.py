"""`mmunotify model check`: whether the software model does what a recorded kernel did."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation
from typing import TYPE_CHECKING, Annotated

import anyio
from cyclopts import App, Parameter

from mmunotify.model.check import Excuses, Guest, Report, read_recordings, summary

from .choices import choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmunotify import AnyDriver

app = App(name="model")


@app.command
def check(
    *files: Path,
    json: Annotated[bool, Parameter(negative="")] = False,
    every: Annotated[bool, Parameter(name="--all", negative="")] = False,
    only: Annotated[list[str] | None, Parameter(negative="")] = None,
    driver: Annotated[str | None, Parameter(name="--driver")] = None,
) -> int:
    """Replay recorded kernel sequences into the model and compare what it does.

    The exit status is 1 if anything disagrees.

    Parameters
    ----------
    files
        Recordings, as JSON lines; plain or compressed with xz.
    json
        Print one JSON object per file, and no disagreements.
    every
        Show every disagreement, not just the first of each sequence: those that follow may be
        its consequences.
    only
        Show only disagreements of this kind of operation ("mremap", "madvise pageout", "exit") or
        in this field ("ev"); may be repeated.
    driver
        Run recorded guests in the virtual machine of this driver, NAME[,option=value]..., which has
        to offer one (`mmunotify.model.check.GuestDriver`), instead of in a plain shadow.
    """
    excuses = Excuses.load()
    guest = Guest if driver is None else choose(driver).create
    reports: list[Report] = []
    for file in files:
        report = anyio.run(_check_file, file, excuses, guest)
        reports.append(report)
        if json:
            print(jsonlib.dumps(report.counts()), flush=True)
            continue
        for line in report.differences(every=every, only=frozenset(only or ())):
            print(line)
        print(_headline(report), flush=True)
    agrees = all(report.agrees for report in reports)
    if not json and not agrees:
        print()
        rows = list(summary(reports))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0 if agrees else 1


async def _check_file(file: Path, excuses: Excuses, guest: Callable[[], AnyDriver]) -> Report:
    report = Report(file)
    for sequence in read_recordings(file):
        await report.check(sequence, excuses, guest)
    return report


def _headline(report: Report) -> str:
    excused = f" ({report.excused} excused)" if report.excused else ""
    return (
        f"{report.file}: agree {report.sequences_agree}/{report.sequences} sequences, "
        f"{report.operations_agree}/{report.operations} operations{excused}, "
        f"{report.announcements_agree}/{report.announcements} announcements"
    )
