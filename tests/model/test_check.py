"""The checker itself: a disagreement in any field is found, and only there."""

from __future__ import annotations

import json
import lzma
from typing import TYPE_CHECKING, Any

import pytest

from mmunotify.errors import RecordingError
from mmunotify.model.check import Excuses, Report, read_recordings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmunotify.model.check import Sequence

OPS: list[dict[str, Any]] = [
    {"op": "mmap", "at": 0, "n": 4},
    {"op": "touch", "at": 0, "n": 2, "rw": "w", "val": 1},
    {"op": "fork", "stay": True, "id": "c1"},
    {"op": "touch", "at": 0, "n": 1, "rw": "w", "val": 2, "in": "c1"},
    {"op": "touch", "at": 0, "n": 3, "rw": "r"},
    {"op": "munmap", "at": 0, "n": 4},
]


def recorded() -> dict[str, Any]:
    """A sequence and what Linux does, written out."""
    anon = [0, 4, "rw-p", "", 0]
    results: list[dict[str, Any]] = [
        {"r": 0, "ev": [], "vma": [[*anon, {}, ""]], "pg": "", "fr": ""},
        {
            "r": 0, "ev": [], "fl": [[0, "w"], [1, "w"]], "mf": 2,
            "vma": [[*anon, {"R": 2, "pd": 2, "y": 2, "an": 2}, ""]], "pg": "0+2a", "fr": "0+2:0",
        },
        {
            "r": 0, "ev": [["u", 0, 4]], "mf": 49,
            "vma": [[*anon, {"R": 2, "sd": 2, "y": 2, "an": 2}, ""]], "pg": "0+2A",
            "vma@c1": [[*anon, {"R": 2, "sd": 2, "an": 2}, ""]], "pg@c1": "0+2A", "fr@c1": "0+2:0",
        },
        {
            "r": 0, "ev": [], "evk": {"c1": [["u", 0, 1, "c1"]]}, "fl": [[0, "wp", "c1"]], "mf": 1,
            "vma": [[*anon, {"R": 2, "sd": 1, "pd": 1, "y": 2, "an": 2}, ""]], "pg": "0+1a 1+1A",
            "vma@c1": [[*anon, {"R": 2, "sd": 1, "pd": 1, "y": 1, "an": 2}, ""]],
            "pg@c1": "0+1a 1+1A", "fr@c1": "0+1:2 1+1:1",
        },
        {
            "r": {"v": [[1, 2], [0, 1]]}, "ev": [], "fl": [[2, "r"]], "mf": 1,
            "pg": "0+1a 1+1A 2+1z",
        },
        {
            "r": 0, "ev": [["u", 0, 4]], "vma": [], "pg": "", "fr": "",
            "vma@c1": [[*anon, {"R": 2, "pd": 2, "y": 1, "an": 2}, ""]], "pg@c1": "0+2a",
        },
    ]  # fmt: skip
    return {"id": "s", "ops": OPS, "results": results, "exit_ev": []}


def write_recording(path: Path, record: dict[str, Any]) -> Iterator[Sequence]:
    path.write_text(json.dumps(record) + "\n")
    return read_recordings(path)


def load_excuses(path: Path, text: str) -> Excuses:
    path.write_text(text)
    return Excuses.load(path)


async def report_on(path: Path, record: dict[str, Any], excuses: str = "") -> Report:
    report = Report(path)
    for sequence in write_recording(path, record):
        await report.check(sequence, load_excuses(path.with_suffix(".toml"), excuses))
    return report


async def test_what_linux_did_agrees(tmp_path: Path) -> None:
    report = await report_on(tmp_path / "s.jsonl", recorded())
    assert list(report.differences()) == []
    assert report.counts() == {
        "file": str(tmp_path / "s.jsonl"),
        "sequences": 1,
        "sequences_agree": 1,
        "operations": 6,
        "operations_agree": 6,
        "announcements": 3,
        "announcements_agree": 3,
    }


WRONG = [
    (1, "r", {"bad": [[0, "SEGV2"]]}, "r"),
    (5, "ev", [["u", 0, 3]], "ev"),
    (5, "ev", [], "ev"),
    (3, "ev", [["u", 0, 1]], "ev"),
    (3, "evk", {"c1": [["a", 0, 1]]}, "ev@c1"),
    (3, "evk", {}, "ev@c1"),
    (1, "fl", [[0, "w"], [1, "wp"]], "fl"),
    (3, "fl", [[0, "wp"]], "fl"),
    (1, "mf", 3, "mf"),
    (1, "Mf", 1, "mf"),
    (1, "vma", [[0, 4, "r--p", "", 0, {"R": 2, "pd": 2, "an": 2}, ""]], "vma"),
    (1, "vma", [[0, 4, "rw-p", "", 0, {"R": 2, "pc": 2, "an": 2}, ""]], "smaps"),
    (1, "pg", "0+1a 1+1A", "pg"),
    (3, "pg@c1", "0+1A 1+1A", "pg@c1"),
    (3, "fr@c1", "0+1:0 1+1:1", "fr@c1"),
    (4, "fr", "0+1:3 1+1:1", "fr"),
]


@pytest.mark.parametrize(("index", "key", "value", "field"), WRONG)
async def test_a_disagreement_is_found_in_its_field(
    tmp_path: Path, index: int, key: str, value: Any, field: str
) -> None:
    record = recorded()
    record["results"][index][key] = value
    report = await report_on(tmp_path / "s.jsonl", record)
    first = report.verdicts[0]
    assert first.operation is not None
    assert first.operation.index == index
    assert field in {each.field for each in first.disagreements}
    assert (report.sequences_agree, report.agrees) == (0, False)
    text = "\n".join(report.differences())
    assert f"s {index}: {OPS[index]['op']}" in text
    assert any(line.startswith(f"  {field}") for line in text.splitlines())


async def test_an_announcement_too_many_is_counted(tmp_path: Path) -> None:
    record = recorded()
    record["results"][5]["ev"] = [["u", 0, 4], ["u", 0, 4]]
    report = await report_on(tmp_path / "s.jsonl", record)
    assert (report.announcements_agree, report.announcements) == (3, 4)
    record["results"][5]["ev"] = []
    report = await report_on(tmp_path / "s.jsonl", record)
    assert (report.announcements_agree, report.announcements) == (2, 3)


async def test_exit_must_be_silent(tmp_path: Path) -> None:
    record = recorded()
    record["exit_ev"] = [["u", 0, 4]]
    report = await report_on(tmp_path / "s.jsonl", record)
    assert (report.operations_agree, report.sequences_agree) == (6, 0)
    assert "s: exit" in list(report.differences())


async def test_what_a_second_run_had_otherwise_may_be_either(tmp_path: Path) -> None:
    record = recorded()
    record["results"][5]["ev"] = [["u", 0, 3]]
    record["results"][5]["pg@c1"] = "0+2A"
    record["nondet"] = [["5.ev", [["u", 0, 4]]], ["5.pg@c1", "0+2a"]]
    report = await report_on(tmp_path / "s.jsonl", record)
    assert report.agrees
    record["nondet"] = [["5.ev", [["u", 0, 2]]], ["5.pg@c1", "0+2a"]]
    report = await report_on(tmp_path / "s.jsonl", record)
    assert [each.field for each in report.verdicts[0].disagreements] == ["ev"]


async def test_referenced_and_the_faults_of_fork_do_not_count(tmp_path: Path) -> None:
    record = recorded()
    record["results"][1]["vma"][0][5]["y"] = 0
    record["results"][2]["mf"] = 12
    assert (await report_on(tmp_path / "s.jsonl", record)).agrees


async def test_unknown_operation_is_a_disagreement(tmp_path: Path) -> None:
    record = recorded()
    record["ops"] = [*OPS[:-1], {"op": "levitate", "at": 0, "n": 4}]
    report = await report_on(tmp_path / "s.jsonl", record)
    assert report.operations_agree == 5
    assert report.announcements_agree == 2
    assert "levitate" in "\n".join(report.differences())


async def test_an_excused_operation_agrees_and_is_counted(tmp_path: Path) -> None:
    record = recorded()
    record["results"][5]["ev"] = [["u", 0, 3]]
    excuses = '[[excuse]]\nop = "munmap"\nn = 4\nreason = "because"\n'
    report = await report_on(tmp_path / "s.jsonl", record, excuses)
    assert report.agrees
    assert report.excused == 1
    excuses = excuses.replace("4", "5")
    assert not (await report_on(tmp_path / "s.jsonl", record, excuses)).agrees


async def test_differences_can_be_filtered(tmp_path: Path) -> None:
    record = recorded()
    record["results"][1]["mf"] = 7
    record["results"][5]["ev"] = []
    report = await report_on(tmp_path / "s.jsonl", record)

    def headers(**options: Any) -> list[str]:
        return [line for line in report.differences(**options) if line.startswith("s ")]

    assert [line[:4] for line in headers()] == ["s 1:"]
    assert [line[:4] for line in headers(every=True)] == ["s 1:", "s 5:"]
    assert [line[:4] for line in headers(only=frozenset({"munmap"}))] == ["s 5:"]
    assert [line[:4] for line in headers(only=frozenset({"ev"}))] == ["s 5:"]


def test_compressed_and_plain_recordings_are_the_same(tmp_path: Path) -> None:
    plain, packed = tmp_path / "s.jsonl", tmp_path / "s.jsonl.xz"
    plain.write_text(json.dumps(recorded()))
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert list(read_recordings(plain)) == list(read_recordings(packed))


def test_what_is_no_recording_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(recorded()) + '\n{"id": "t"}\n')
    with pytest.raises(RecordingError, match=r"s\.jsonl:2: expected a recorded sequence"):
        list(read_recordings(path))


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.xz"])
def test_what_is_no_recording_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(range(200, 256)))
    with pytest.raises(RecordingError, match=r"s\.jsonl(\.xz)?:1: expected a recorded sequence"):
        list(read_recordings(path))
