"""`mmunotify model check --driver`: recorded guests in the virtual machine of a plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GUESTS = Path(__file__).parents[1] / "data" / "oracle" / "guest_random.jsonl.xz"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmunotify", "model", "check", *arguments],
        text=True,
        capture_output=True,
        check=False,
    )


def test_a_plugin_runs_recorded_guests() -> None:
    """As many sequences agree with the plugin's machine as with the plain guest."""
    found = [
        json.loads(check("--json", str(GUESTS), *arguments).stdout)
        for arguments in ((), ("--driver", "kvm"), ("--driver", "kvm,vcpus=2"))
    ]
    assert found[0]["sequences"] == 75
    assert found[0]["sequences_agree"] <= found[1]["sequences_agree"] == found[2]["sequences_agree"]


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        ("atomic", "has no guest: expected the methods of GuestDriver"),
        ("kvn", "no driver 'kvn': did you mean 'kvm'?"),
        ("kvm,memory=lots", "size 'lots': expected a number of bytes"),
    ],
)
def test_a_driver_that_cannot_is_an_error(driver: str, message: str) -> None:
    """The command says what is wrong with it, and shows no trace."""
    done = check("--driver", driver, str(GUESTS))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
