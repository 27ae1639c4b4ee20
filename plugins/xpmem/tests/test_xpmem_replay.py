"""`mmunotify replay --driver xpmem,importers=…`: importers are the recorded program's device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SQLITE = Path(__file__).parents[3] / "tests" / "data" / "traces" / "sqlite.mmt.xz"

if not SQLITE.exists():  # in a source distribution of the plugin alone
    pytest.skip("the recordings are in the repository", allow_module_level=True)


def replay(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "mmunotify", "replay", str(SQLITE), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (driver,) = json.loads(done.stdout)["drivers"]
    found: dict[str, Any] = driver
    return found


def test_importers_attach_what_was_recorded() -> None:
    """What the program unmaps and discards is taken from them, and as many pages are unpinned as
    were pinned."""
    four = replay("--driver", "xpmem,importers=4,pin=true")
    assert four["installed"] > four["counters"]["pinned"], "several have the same page"
    assert four["mapped"] > four["refaults"] > 0
    assert four["counters"]["pinned"] == four["counters"]["unpinned"] > four["mapped"]
    assert four["kind"] == "sleepable"


@pytest.mark.long
def test_each_importer_faults_for_itself() -> None:
    """Four touch more pages than one, though not four times as many accesses are there."""
    one, four = (replay("--driver", f"xpmem,importers={count}") for count in (1, 4))
    assert 1.5 * one["installed"] < four["installed"] < 4 * one["installed"]


@pytest.mark.long
def test_where_nobody_may_sleep_the_deferred_driver_sees_the_same() -> None:
    """Both answers flush what is mapped when it goes."""
    sleeps = replay("--driver", "xpmem,importers=2")
    marks = replay("--driver", "xpmem-deferred,importers=2", "--locks", "spin")
    assert marks["kind"] == "deferred"
    assert marks["mapped"] == pytest.approx(sleeps["mapped"], rel=0.1)
