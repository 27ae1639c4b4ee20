"""`mmunotify replay` and `compare` with the GRU attached."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmunotify_gru.statistics import NAMES

ROOT = Path(__file__).parents[3]
SQLITE = ROOT / "tests" / "data" / "traces" / "sqlite.mmt.xz"

if not SQLITE.exists():  # in a source distribution of the plugin alone
    pytest.skip("the recordings are in the repository", allow_module_level=True)


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "mmunotify", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_replay_counts_what_the_original_counts() -> None:
    """Under its names, below the figures that every device has; and they agree with those."""
    found = json.loads(
        run("replay", SQLITE, "--driver", "gru,contexts=4,tlb=8,miss=poll", "--json")
    )
    (driver,) = found["drivers"]
    counters: dict[str, int] = driver["counters"]
    assert counters.keys() <= set(NAMES)
    assert driver["installed"] == counters["tlb_dropin"] > driver["refaults"] > 0
    assert counters["mmu_invalidate_range"] == driver["callbacks"]["invalidate_range_start"]
    assert counters["assign_context"] == counters["free_context"] == counters["gts_free"]
    assert counters["call_os"] == counters["tlb_dropin"]
    assert "intr" not in counters
    assert counters["flush_tlb_gru_tgh"] > counters["flush_tlb"] > driver["flushes"] > 0
    assert counters["gms_free"] == counters["gms_alloc"]


def test_the_table_has_its_counters() -> None:
    """Those that are not 0."""
    shown = run("replay", SQLITE, "--driver", "gru", "--driver", "atomic")
    assert re.search(r"refaults +\d+ +\d+\n", shown)
    assert re.search(r"mmu_invalidate_range +[\d,]+ +-\n", shown)
    assert re.search(r"flush_tlb_gru_tgh +[\d,]+ +-\n", shown)
    assert "steal" not in shown


@pytest.mark.long
@pytest.mark.parametrize(
    ("recording", "device", "load"),
    [
        ("sqlite", "same", "every page that the program faults on"),
        ("redis", "hot:64", "a working set of 64 pages"),
    ],
)
def test_the_published_comparison_can_be_repeated(recording: str, device: str, load: str) -> None:
    """What batching costs the device, as the table says it."""
    path = SQLITE.with_name(f"{recording}.mmt.xz")
    lines = run(
        *("compare", path, "--driver", "gru", "--locks", "rwsem", "--device", device, "--json")
    ).splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [row["batching"] for row in rows] == ["page", "pte512", "gather", "range"]
    published = (ROOT / "plugins" / "gru" / "batching.md").read_text()
    flushes = [row["counters"]["flush_tlb_gru_tgh"] for row in rows]
    refaults = [row["refaults"] for row in rows]
    for label, counts in (("TLB flush operations", flushes), ("refaults", refaults)):
        numbers = " | ".join(f"{count:,}" for count in counts)
        assert f"| {recording} | {load} | {label} | {numbers} |" in published
