"""What a real KVM guest did to its host's memory, done again in this machine."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from mmunotify import Registry
from mmunotify.model.check import Excuses, Report, read_recordings
from mmunotify_kvm import DRIVER

ORACLE = Path(__file__).parents[3] / "tests" / "data" / "oracle"
RECORDINGS = sorted(ORACLE.glob("guest*.jsonl.xz"))


@pytest.mark.skipif(not RECORDINGS, reason="recordings are in the repository only")
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name.partition(".")[0])
def test_faults_and_mappings_are_those_of_kvm(path: Path) -> None:
    """Every page fault that reached KVM reaches this one, and it maps the same, in this order."""
    registry = Registry.for_testing([DRIVER])
    report = Report(path)

    async def check() -> None:
        for sequence in read_recordings(path):
            await report.check(sequence, Excuses.load(), lambda: registry.create("kvm"))

    anyio.run(check)
    wrong = [
        f"{verdict.sequence} {verdict.operation}: {each.field} {each.expected} | {each.got}"
        for verdict in report.verdicts
        for each in verdict.disagreements
        if each.field in {"gf", "gm"}
    ]
    assert wrong == []
    compared = sum(tally.compared["gf"] for tally in report.kinds.values())
    assert compared == report.operations > 200
