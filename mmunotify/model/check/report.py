"""Counting verdicts, and what is printed of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import attrs

from .compare import check_sequence
from .guest import Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mmunotify.drivers import AnyDriver

    from .compare import Verdict
    from .recordings import Excuses, Sequence

FIELDS: Final = ("problem", "r", "ev", "fl", "mf", "gf", "gm", "vma", "smaps", "pg", "fr")
"""The columns of the summary; a child's fields are counted with the parent's."""


@attrs.define
class Tally:
    """What agrees, of one kind of operation."""

    operations: int = 0
    operations_agree: int = 0
    first: int = 0
    """Sequences whose first disagreement is an operation of this kind."""
    compared: Counter[str] = attrs.Factory(Counter)
    disagree: Counter[str] = attrs.Factory(Counter)


@attrs.define
class Report:
    """What agrees in one file of recordings."""

    file: Path
    sequences: int = 0
    sequences_agree: int = 0
    operations: int = 0
    operations_agree: int = 0
    announcements: int = 0
    announcements_agree: int = 0
    excused: int = 0
    verdicts: list[Verdict] = attrs.Factory(list)
    """Those that disagree, in order."""
    kinds: dict[str, Tally] = attrs.Factory(dict)

    @property
    def agrees(self) -> bool:
        """Whether everything that is not excused agrees."""
        return not self.verdicts

    async def check(
        self, sequence: Sequence, excuses: Excuses, guest: Callable[[], AnyDriver] = Guest
    ) -> None:
        """Replay one sequence, with a guest made by `guest`, and count it."""
        self.sequences += 1
        diverged = False
        async for verdict in check_sequence(sequence, excuses, guest):
            self._count(verdict, first=not diverged)
            diverged = diverged or not verdict.agrees
        self.sequences_agree += not diverged

    def _count(self, verdict: Verdict, *, first: bool) -> None:
        self.announcements += verdict.announcements
        self.announcements_agree += verdict.announcements_agree
        if not verdict.agrees:
            self.verdicts.append(verdict)
        if verdict.operation is None:
            return
        self.operations += 1
        self.operations_agree += verdict.agrees
        self.excused += verdict.excuse is not None
        tally = self.kinds.setdefault(verdict.operation.detail, Tally())
        tally.operations += 1
        tally.operations_agree += verdict.agrees
        tally.first += first and not verdict.agrees
        tally.compared.update({field.partition("@")[0] for field in verdict.compared})
        tally.disagree.update({each.field.partition("@")[0] for each in verdict.disagreements})

    def counts(self) -> dict[str, str | int]:
        """What `--json` prints."""
        return {
            "file": str(self.file),
            "sequences": self.sequences,
            "sequences_agree": self.sequences_agree,
            "operations": self.operations,
            "operations_agree": self.operations_agree,
            "announcements": self.announcements,
            "announcements_agree": self.announcements_agree,
        }

    def differences(
        self, *, every: bool = False, only: frozenset[str] = frozenset()
    ) -> Iterator[str]:
        """The disagreements as lines: the first of each sequence, or every one.

        `only` names kinds of operation ("mremap", "madvise pageout") or fields ("ev"); "exit" is
        what happens after the last operation.
        """
        shown: set[str] = set()
        for verdict in self.verdicts:
            operation = verdict.operation
            names = {operation.kind, operation.detail} if operation else {"exit"}
            fields = {each.field.partition("@")[0] for each in verdict.disagreements}
            if only and not only & (names | fields):
                continue
            if verdict.sequence in shown and not every:
                continue
            shown.add(verdict.sequence)
            yield ""
            yield (
                f"{verdict.sequence} {operation.index}: {operation}"
                if operation
                else f"{verdict.sequence}: exit"
            )
            for each in verdict.disagreements:
                if not only or names & only or each.field.partition("@")[0] in only:
                    yield f"  {each.field:8} expected  {each.expected}"
                    yield f"  {'':8} got       {each.got}"


def summary(reports: list[Report]) -> Iterator[list[str]]:
    """Rows of a table by kind of operation, those that disagree most often first; header first.

    A field's column says how many operations disagree in it.
    """
    kinds: dict[str, Tally] = {}
    for report in reports:
        for kind, tally in report.kinds.items():
            total = kinds.setdefault(kind, Tally())
            total.operations += tally.operations
            total.operations_agree += tally.operations_agree
            total.first += tally.first
            total.compared += tally.compared
            total.disagree += tally.disagree
    yield ["operation", "agree", "first", *FIELDS]
    for kind, tally in sorted(kinds.items(), key=lambda item: (-item[1].first, item[0])):
        if tally.operations_agree == tally.operations:
            continue
        yield [
            kind,
            f"{tally.operations_agree}/{tally.operations}",
            str(tally.first or ""),
            *(_share(tally, field) for field in FIELDS),
        ]


def _share(tally: Tally, field: str) -> str:
    wrong, total = tally.disagree[field], tally.compared[field]
    return f"{total - wrong}/{total}" if wrong else ""
