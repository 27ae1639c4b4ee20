"""Checking recorded guests: what a hypervisor maps is compared, and a driver may be it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import mmunotify as mn
from mmunotify.errors import DriverConfigError
from mmunotify.model.check import Excuses, Guest, GuestDriver, Report, read_recordings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mmunotify.model.check import Sequence


def recorded() -> dict[str, Any]:
    """A guest on memory that its host has, and on some that it has not; with what KVM did."""
    private = [0, 16, "rw-p", "", 0]
    eight = {"R": 8, "pd": 8, "y": 8, "an": 8}
    ahead = [[page, "w-"] for page in (1, 3, 4, 5, 6, 7)]
    return {
        "id": "g",
        "guest": 1,
        "ops": [
            {"op": "mmap", "at": 0, "n": 16},
            {"op": "touch", "at": 0, "n": 8, "rw": "w", "val": 3},
            {"op": "gtouch", "at": 2, "n": 1, "rw": "r"},
            {"op": "madvise", "at": 0, "n": 1, "adv": "dontneed"},
            {"op": "gtouch", "at": 20, "n": 1, "rw": "w", "val": 1},
        ],
        "results": [
            {"r": 0, "ev": [], "vma": [[*private, {}, ""]], "pg": "", "fr": ""},
            {
                "r": 0, "ev": [], "fl": [[page, "w"] for page in range(8)], "mf": 8,
                "vma": [[*private, eight, ""]], "pg": "0+8a", "fr": "0+8:0",
            },
            {"r": {"v": [[3, 1]]}, "ev": [], "gf": [[2, "r"]], "gm": [[2, "w"], [0, "w-"], *ahead]},
            {
                "r": 0, "ev": [["u", 0, 1]], "vma": [[*private, {**eight, "R": 7, "pd": 7, "an": 7},
                ""]], "pg": "1+7a", "fr": "1+7:1",
            },
            {"r": {"bad": [[20, "EFAULT"]]}, "ev": [], "gf": [[20, "w"]], "mf": 1},
        ],
        "exit_ev": [],
    }  # fmt: skip


def write_recording(path: Path, record: dict[str, Any]) -> Iterator[Sequence]:
    path.write_text(json.dumps(record) + "\n")
    return read_recordings(path)


async def report_on(
    path: Path, record: dict[str, Any], guest: Callable[[], mn.AnyDriver] = Guest
) -> Report:
    report = Report(path)
    for sequence in write_recording(path, record):
        await report.check(sequence, Excuses([]), guest)
    return report


async def test_what_kvm_did_agrees(tmp_path: Path) -> None:
    """The plain guest faults where KVM's did, and maps the same ahead."""
    report = await report_on(tmp_path / "g.jsonl", recorded())
    assert list(report.differences()) == []


@pytest.mark.parametrize(
    ("index", "field", "value"),
    [
        (2, "gf", [[2, "w"]]),
        (2, "gf", [[2, "r"], [2, "r"]]),
        (2, "gm", [[2, "w"]]),
        (4, "gf", []),
        (4, "gm", [[20, "w"]]),
        (3, "gf", [[0, "r"]]),
    ],
)
async def test_another_fault_or_mapping_is_a_disagreement(
    tmp_path: Path, index: int, field: str, value: list[Any]
) -> None:
    """Each in its field, at its operation; unless a second run did that."""
    record = recorded()
    right = record["results"][index].get(field, [])
    record["results"][index][field] = value
    report = await report_on(tmp_path / "g.jsonl", record)
    (verdict,) = report.verdicts
    assert verdict.operation is not None
    assert verdict.operation.index == index
    assert [each.field for each in verdict.disagreements] == [field]
    record["nondet"] = [[f"{index}.{field}", right]]
    assert (await report_on(tmp_path / "g.jsonl", record)).agrees


class Other(Guest):
    """A guest of a driver's."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Other.made += 1


async def test_a_driver_takes_the_place_of_the_guest(tmp_path: Path) -> None:
    """One is made for each sequence."""
    assert isinstance(Other(), GuestDriver)
    Other.made = 0
    report = await report_on(tmp_path / "g.jsonl", recorded(), Other)
    assert report.agrees
    assert Other.made == 1


async def test_a_driver_without_a_guest_is_refused(tmp_path: Path) -> None:
    """What it lacks is said."""
    with pytest.raises(DriverConfigError, match="has no guest: expected the methods of GuestDrive"):
        await report_on(tmp_path / "g.jsonl", recorded(), mn.AtomicDriver)
