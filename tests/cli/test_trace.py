"""`mmunotify trace`, run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmunotify.cli.trace import cut, info, keep
from mmunotify.errors import RecordingError
from mmunotify.traces.recording import Recording

SQLITE = Path(__file__).parent.parent / "data" / "traces" / "sqlite.mmt.xz"


def test_info_shows_what_is_in_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    info(SQLITE)
    shown = capsys.readouterr().out
    assert "14,676 events of 0.676 s, recorded by kernel with announcements" in shown
    assert "announcements" in shown
    assert "11,197" in shown


def test_info_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    info(SQLITE, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"]["u"] == 11197
    assert found["root"] == 31507


def test_cut_and_filter_write_recordings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, one = tmp_path / "half.mmt", tmp_path / "one.mmt.xz"
    cut(SQLITE, output=half, begin=0.3)
    keep(half, output=one, process=31507)
    whole = sum(map(len, Recording(half).blocks()))
    part = sum(map(len, Recording(one).blocks()))
    assert part <= whole < 14676
    said = capsys.readouterr().err
    assert f"{half}: {whole:,} events" in said
    assert f"{one}: {part:,} events of process 31507" in said


def test_filter_has_to_be_told_what_to_keep(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="expected --process NUMBER or --program NAME"):
        keep(SQLITE, output=tmp_path / "x.mmt")
    assert list(tmp_path.iterdir()) == []
