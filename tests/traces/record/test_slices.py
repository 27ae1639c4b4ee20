"""Slices of recordings: what they have, and that they replay as the whole does."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import anyio
import pytest

from mmunotify.errors import RecordingError
from mmunotify.traces.figures import figures
from mmunotify.traces.record.contents import contents
from mmunotify.traces.record.slices import Source, cut, process
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Design, Replay

DATA = Path(__file__).parents[2] / "data" / "traces"
SQLITE = DATA / "sqlite.mmt.xz"

LINES = """\
400 > 7 execve{blank}
10 o 7 1000 3000 rw-p 0 0 //anon
0 x 7 /bin/a b
0 < 7 execve 0
10 v 7 S 1000 3000 rw-p 00000000 0{blank}
0 f 7 1000 1000 6
100 > 7 clone 1200011 0 0 0 0
0 u 7 1000 3000
0 m 7 aa 1 4096
0 n 7 8 1200011
1 < 7 clone 8
1 v 8 F 1000 3000 rw-p 00000000 0{blank}
100 f 8 1000 1000 7
0 u 8 1000 2000
100 u 66 2000 3000
1 m 66 aa 1 -4096
1 u 66 2000 3000
1 m 66 bb 1 -4096
100 > 8 execve{blank}
0 m 8 cc 1 4096
0 o 8 5000 6000 rw-p 0 0 //anon
0 x 8 /bin/c
0 < 8 execve 0
50 e 8
50 e 7
""".format(blank=" ")


def source(tmp_path: Path, text: str = LINES) -> Source:
    header = {"cmd": ["a b"], "vm": True, "wall_ms": 1, "root": 7, "lost": [0, 0], "extra": [1]}
    path = tmp_path / "whole.mmt"
    path.write_text(f"#{json.dumps({**header, 'events': text.count(chr(10))})}\n{text}")
    return Source(path)


def written(path: Path) -> tuple[dict[str, Any], list[str]]:
    first, *lines = path.read_text().splitlines()
    return json.loads(first[1:]), lines


def replayed(path: Path) -> dict[str, Any]:
    replay = Replay(Recording(path), Design())
    anyio.run(replay.run)
    return figures(replay)


def test_a_slice_has_what_its_memory_depends_on_and_its_own_events(tmp_path: Path) -> None:
    output = tmp_path / "slice.mmt"
    events = cut(source(tmp_path), output, 0.0002, 0.0005, bare=False)
    header, lines = written(output)
    assert (header["extra"], header["root"], header["slice"]) == ([1], 7, [0.0002, 0.0005])
    assert header["events"] == events == len(lines)
    assert lines == [
        "0 > 7 execve ",
        "0 o 7 1000 3000 rw-p 0 0 //anon",
        "0 x 7 /bin/a b",
        "0 < 7 execve 0",
        "0 f 7 1000 1000 6",
        "0 > 7 clone 1200011 0 0 0 0",
        "0 m 7 aa 1 4096",
        "0 n 7 8 1200011",
        "0 < 7 clone 8",
        "0 v 7 S 1000 3000 rw-p 00000000 0 ",
        "0 v 8 F 1000 3000 rw-p 00000000 0 ",
        "22 f 8 1000 1000 7",
        "0 u 8 1000 2000",
        "100 u 66 2000 3000",
        "1 m 66 aa 1 -4096",
        "1 u 66 2000 3000",
        "1 m 66 bb 1 -4096",
        "100 > 8 execve ",
        "0 m 8 cc 1 4096",
        "0 o 8 5000 6000 rw-p 0 0 //anon",
        "0 x 8 /bin/c",
        "0 < 8 execve 0",
        "50 e 8",
    ]


def test_a_bare_slice_has_its_own_events_only(tmp_path: Path) -> None:
    output = tmp_path / "slice.mmt"
    cut(source(tmp_path), output, 0.0, 0.00002, bare=True)
    assert [line.split()[1] for line in written(output)[1]] == list(">ox<")


@pytest.mark.parametrize(("begin", "end"), [(-1, 1), (1, 1), (2, 1)])
def test_a_slice_of_no_time_is_an_error(tmp_path: Path, begin: float, end: float) -> None:
    with pytest.raises(RecordingError, match="expected 0 <= FROM < TO, in seconds"):
        cut(source(tmp_path), tmp_path / "slice.mmt", begin, end, bare=False)
    assert not (tmp_path / "slice.mmt").exists()


def test_a_process_begins_with_its_execve(tmp_path: Path) -> None:
    output = tmp_path / "one.mmt"
    tid, events = process(source(tmp_path), output, lambda tid, path: path == "/bin/c")
    header, lines = written(output)
    assert (tid, header["root"], events) == (8, 8, len(lines))
    assert lines == [
        "0 > 8 execve ",
        "0 m 8 cc 1 4096",
        "0 o 8 5000 6000 rw-p 0 0 //anon",
        "0 x 8 /bin/c",
        "0 < 8 execve 0",
        "50 e 8",
    ]


def test_a_forked_process_has_the_past_of_its_parent(tmp_path: Path) -> None:
    text = "".join(line for line in LINES.splitlines(keepends=True)[:18]) + "50 e 8\n50 e 7\n"
    output = tmp_path / "one.mmt"
    tid, _ = process(source(tmp_path, text), output, lambda tid, path: tid == 8)
    header, lines = written(output)
    assert (tid, header["root"]) == (8, 7)
    assert [" ".join(line.split()[1:3]) for line in lines] == [
        *("> 7", "o 7", "x 7", "< 7", "f 7", "> 7", "m 7", "n 7"),
        *("v 8", "f 8", "u 8", "e 8"),
    ]


def test_reclaim_goes_with_the_process_whose_counters_follow(tmp_path: Path) -> None:
    output = tmp_path / "one.mmt"
    process(source(tmp_path), output, lambda tid, path: tid == 7)
    lines = written(output)[1]
    assert [line.split(" ", 1)[1] for line in lines if " 66 " in line] == [
        "u 66 2000 3000",
        "m 66 aa 1 -4096",
    ]


def test_nobody_wanted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="expected a process like that, found none"):
        process(source(tmp_path), tmp_path / "one.mmt", lambda tid, path: False)


def test_a_slice_of_a_program_replays_as_exactly_as_the_whole(tmp_path: Path) -> None:
    output = tmp_path / "slice.mmt.xz"
    cut(Source(SQLITE), output, 0.2, 0.6, bare=False)
    found = replayed(output)
    assert 5000 < found["kernel_announcements"] < 11197
    assert found["matched"] >= 0.99 * found["kernel_announcements"]
    assert found["extra"] <= 0.01 * found["kernel_announcements"]


def test_a_process_of_a_program_replays_as_exactly_as_the_whole(tmp_path: Path) -> None:
    output = tmp_path / "one.mmt.xz"
    process(Source(SQLITE), output, lambda tid, path: "python" in path or "sqlite" in path)
    found = replayed(output)
    assert found["kernel_announcements"] > 1000
    assert found["matched"] >= 0.99 * found["kernel_announcements"]


def test_contents_count_what_is_there() -> None:
    found = contents(Source(SQLITE))
    assert found["read"] == found["events"] == sum(found["kinds"].values()) == 14676
    assert found["kinds"]["u"] == sum(found["pages"].values()) == 11197
    assert found["calls"]["openat"] == 107
    assert not found["truncated"]


def test_contents_of_half_a_file_say_so(tmp_path: Path) -> None:
    path = tmp_path / "half.mmt.xz"
    path.write_bytes(SQLITE.read_bytes()[:9000])
    found = contents(Source(path))
    assert found["truncated"]
    assert 0 < found["read"] < found["events"]


def test_a_line_that_is_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"whole.mmt:3:1: expected microseconds"):
        contents(source(tmp_path, "1 e 7\nx e 7\n"))


def test_lines_are_written_as_they_were(tmp_path: Path) -> None:
    output = tmp_path / "copy.mmt.xz"
    cut(Source(SQLITE), output, 0, 10, bare=False)
    copied, whole = (lzma.decompress(path.read_bytes()).splitlines() for path in (output, SQLITE))
    assert copied[2:] == whole[2:]
