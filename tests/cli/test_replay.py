"""`mmunotify replay` and `compare`, run as commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent.parent / "data" / "traces"
SQLITE = DATA / "sqlite.mmt.xz"
COMMAND = (sys.executable, "-m", "mmunotify")


def run(*arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout if not status else done.stderr


def test_json_has_the_figures_and_one_object_per_recording(tmp_path: Path) -> None:
    text = (DATA / "sqlite.mmt.xz").read_bytes()
    cut = tmp_path / "cut.mmt.xz"
    cut.write_bytes(text[: len(text) // 2])
    lines = run("replay", SQLITE, cut, "--driver", "atomic", "--json").splitlines()
    whole, part = map(json.loads, lines)
    assert whole["kernel_announcements"] == 11197
    assert whole["matched"] >= 0.99 * 11197
    assert whole["events"] == 14676
    assert whole["recorded_seconds"] == pytest.approx(0.676, abs=0.001)
    assert whole["replay_seconds"] > 0
    (driver,) = whole["drivers"]
    assert driver["callbacks"]["invalidate_range_start"] >= whole["matched"]
    assert driver["installed"] > driver["refaults"] > 0
    assert (whole["truncated"], part["truncated"]) == (False, True)
    assert part["events"] < whole["events"]


def test_tables_say_what_was_told_and_how_much_matched() -> None:
    shown = run("replay", SQLITE, "--driver", "atomic", "--driver", "deferred")
    assert re.search(r"invalidate_range_start +11,\d{3} +0", shown)
    assert re.search(r"invalidate_range_sync +0 +11,\d{3}", shown)
    assert "the kernel announced 11,197 ranges" in shown


class Page(HTMLParser):
    """The tables and the plots of a report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.plots: dict[str, int] = {}
        self.heights: dict[str, list[float]] = {}
        """Of the bars of each plot, for a count of one."""
        self.areas = 0
        self.foreign: list[str] = []
        self.cells: list[str] = []
        self._plot = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.foreign += [str(values[key]) for key in ("src", "href") if key in values]
        if tag == "svg":
            self._plot = str(values["aria-label"])
            self.plots[self._plot] = 0
            self.heights[self._plot] = []
        if tag == "rect":
            count = int(values.get("data-count") or 0)
            self.plots[self._plot] += count
            if count >= 100:
                self.heights[self._plot].append(float(values["height"] or 0) / count)
            self.areas += "data-start" in values
        self._in_cell = tag in {"th", "td"}

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)
            self._in_cell = False


def check_report(text: str, found: dict[str, Any]) -> None:
    """The plots add up to the numbers of the tables, and nothing is fetched."""
    page = Page(text)
    assert page.foreign == []
    (driver,) = found["drivers"]
    starts = driver["callbacks"]["invalidate_range_start"]
    assert page.plots["announcements over time"] == page.plots["range sizes"] == starts
    assert page.plots["latency of atomic"] == sum(driver["callbacks"].values())
    heights = page.heights["announcements over time"]
    assert max(heights) == pytest.approx(min(heights), rel=0.05)
    assert page.areas > 50
    assert f"{starts:,}" in page.cells
    assert f"{driver['pages']:,}" in page.cells


def test_report_has_the_numbers_of_the_tables_and_the_log_is_lines(tmp_path: Path) -> None:
    html, log = tmp_path / "report.html", tmp_path / "log.ndjson"
    shown = run("replay", SQLITE, "--driver", "atomic", "--json", "--report", html, "--log", log)
    found = json.loads(shown)
    check_report(html.read_text(), found)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {event["event"] for event in events} == {"invalidate_range", "callback"}
    assert {event.get("driver") for event in events} == {None, "AtomicTlb"}
    calls = [event["callback"] for event in events if event["event"] == "callback"]
    (driver,) = found["drivers"]
    for name in ("invalidate_range_start", "invalidate_range_end"):
        assert calls.count(name) == driver["callbacks"][name]


@pytest.mark.long
def test_report_opens_in_a_browser(tmp_path: Path) -> None:
    """What the browser has made of it has the numbers too."""
    from shutil import which

    browser = which("chromium")
    if browser is None:
        pytest.skip("no chromium here")
    html = tmp_path / "report.html"
    found = json.loads(run("replay", SQLITE, "--driver", "atomic", "--json", "--report", html))
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/home")
    dom = subprocess.run(
        [browser, *flags, "--dump-dom", html.as_uri()], capture_output=True, text=True, check=True
    ).stdout
    check_report(dom, found)


def test_ctrl_c_leaves_a_table_and_a_valid_log(tmp_path: Path) -> None:
    log = tmp_path / "log.ndjson"
    redis = DATA / "redis.mmt.xz"
    command = [*COMMAND, "replay", *[str(redis)] * 3, "--driver", "atomic", "--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in shown
    assert "time in callbacks" in shown
    assert [json.loads(line) for line in log.read_text().splitlines()]


def test_compare_has_a_row_for_each_combination() -> None:
    shown = run(
        "compare", SQLITE, "--driver", "atomic", "--driver", "sleepable", "--batching", "range",
        "--json",
    )  # fmt: skip
    rows = [json.loads(line) for line in shown.splitlines()]
    assert [(row["driver"], row["locks"], "impossible" in row) for row in rows] == [
        ("atomic", "spin", False),
        ("atomic", "rwsem", False),
        ("sleepable", "spin", True),
        ("sleepable", "rwsem", False),
    ]
    assert len({row["refaults"] for row in rows if "refaults" in row}) == 1


@pytest.mark.long
def test_the_threads_comparison_has_its_twelve_cells() -> None:
    shown = run("compare", SQLITE, "--thread")
    rows = [line.split() for line in shown.splitlines() if re.match("atomic|sleep|defer", line)]
    assert len(rows) == 12
    assert [row[:3] for row in rows if "n/a" in row] == [
        ["sleepable", "rwsem", "page"],
        ["sleepable", "rwsem", "pte512"],
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("replay",), 'Command "replay" parameter FILES requires'),
        (("replay", "nix.mmt"), "nix.mmt: expected a recording: No such file"),
        (("replay", __file__), f"{__file__}:1:1: expected a line #{{...}}"),
        (("replay", SQLITE, "--device", "hot"), "Invalid value for --device: 'hot': expected same"),
        (("replay", SQLITE, "--driver", "nix"), "no driver 'nix'"),
        (("replay", SQLITE, "--log", "/nix/log"), "/nix/log: No such file or directory"),
        (("replay", SQLITE, "--report", "/nix/page"), "/nix/page: No such file or directory"),
        (("compare", SQLITE, "--repeat", "0"), 'Invalid value "0" for --repeat. Must be >= 1.'),
        (("replay", SQLITE, "--driver", "atomic,x=1"), "driver 'atomic' has no option 'x'"),
        (("replay", SQLITE, "--driver", "kvm,x"), "driver 'kvm': expected option=value"),
        (
            ("replay", SQLITE, "--driver", "sleepable", "--locks", "spin"),
            "sleepable sleeps, which nobody may under spinlocks",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[object, ...], error: str) -> None:
    said = run(*arguments, status=1)
    assert said.startswith(f"mmunotify: {error}")
    assert said.count("\n") == 1
