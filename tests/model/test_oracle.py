"""The model against what a Linux 6.18 did, operation by operation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import anyio
import pytest

from mmunotify.model.check import Excuses, Report, read_recordings

RECORDINGS = sorted((Path(__file__).parents[1] / "data" / "oracle").glob("*.jsonl.xz"))
NEVER_EXCUSED = {
    "munmap", "mmap", "mprotect", "mremap", "fork", "madvise", "truncate", "fallocate", "fsync",
    "msync", "reclaim",
}  # fmt: skip


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name.partition(".")[0])
def test_recording_agrees(path: Path) -> None:
    report = Report(path)

    async def check() -> None:
        for sequence in read_recordings(path):
            await report.check(sequence, Excuses.load())

    anyio.run(check)
    assert report.agrees, "\n".join(islice(report.differences(), 60))
    assert report.operations == report.operations_agree > 0


def test_excuses_are_few_and_spare_what_matters() -> None:
    excuses = Excuses.load()
    total = excused = 0
    for path in RECORDINGS:
        for sequence in read_recordings(path):
            for operation in sequence.operations:
                total += 1
                if excuses.reason(operation) is not None:
                    excused += 1
                    assert operation.kind not in NEVER_EXCUSED
                    assert operation.detail != "touch w"
    assert excused <= total // 100
