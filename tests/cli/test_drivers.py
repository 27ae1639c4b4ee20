from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import attrs
import pytest

if TYPE_CHECKING:
    from pathlib import Path

SPEC = """
import attrs
from mmunotify import AtomicDriver, Capability, DriverSpec

@attrs.define
class Options:
    size: int = 1

class Driver(AtomicDriver):
    pass

DRIVER = DriverSpec(
    name="NAME",
    api=(1, 0),
    summary="in [brackets]",
    capabilities={Capability.ATOMIC},
    factory=f"{__name__}:Driver",
    config=Options,
)
"""


@attrs.frozen
class Result:
    status: int
    out: str
    err: str


@attrs.frozen
class CommandLine:
    """The command, in an environment whose only drivers are those that a test installs."""

    site: Path
    names: list[str] = attrs.Factory(list)

    def install(self, name: str, code: str = SPEC) -> None:
        info = self.site / f"{name}_driver-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}-driver\nVersion: 1.2\n"
        )
        (info / "entry_points.txt").write_text(
            f"[mmunotify.drivers]\n{name} = {name}_driver:DRIVER\n"
        )
        (self.site / f"{name}_driver.py").write_text(code.replace("NAME", name))
        self.names.append(name)

    def __call__(self, *arguments: str, **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "mmunotify", *arguments],
            env={
                **os.environ,
                "COLUMNS": "200",
                "PYTHONPATH": str(self.site),
                "MMUNOTIFY_DRIVERS": ",".join(self.names),
                **environment,
            },
            text=True,
            capture_output=True,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def mmunotify(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


def test_list_shows_what_can_be_used_and_what_cannot(mmunotify: CommandLine) -> None:
    """A broken driver is a row with its reason, not an error; nothing is logged."""
    mmunotify.install("good")
    mmunotify.install("broken", "1 / 0")
    done = mmunotify("drivers", "list")
    assert (done.status, done.err) == (0, "")
    broken, good = (line.split("│")[1:-1] for line in done.out.splitlines() if "driver" in line[5:])
    assert [cell.strip() for cell in good] == [
        *("good", "1.2", "good-driver", "atomic", "loaded", "")
    ]
    assert [cell.strip() for cell in broken[:5]] == [
        *("broken", "1.2", "broken-driver", "", "quarantined")
    ]
    assert "ZeroDivisionError: division by zero" in broken[5]


def test_list_as_json(mmunotify: CommandLine) -> None:
    """One array of flat objects, the same keys for every driver."""
    mmunotify.install("good")
    mmunotify.install("broken", "1 / 0")
    broken, good = json.loads(mmunotify("drivers", "list", "--json").out)
    assert good == {
        "name": "good",
        "summary": "in [brackets]",
        "version": "1.2",
        "distribution": "good-driver",
        "spec": "good_driver:DRIVER",
        "api": "1.0",
        "capabilities": ["atomic"],
        "options": ["size"],
        "state": "loaded",
        "reason": None,
    }
    assert broken.keys() == good.keys()
    assert (broken["state"], broken["capabilities"]) == ("quarantined", [])
    assert "ZeroDivisionError" in broken["reason"]


def test_list_of_nothing(mmunotify: CommandLine) -> None:
    """Says how to get a driver."""
    done = mmunotify("drivers", "list")
    assert done.status == 0
    assert "pip install mmunotify-kvm" in done.out
    assert json.loads(mmunotify("drivers", "list", "--json").out) == []


def test_strict_makes_a_broken_driver_an_error(mmunotify: CommandLine) -> None:
    """The table still comes, and the error is one line."""
    mmunotify.install("broken", "1 / 0")
    done = mmunotify("drivers", "list", MMUNOTIFY_STRICT="1")
    assert done.status == 1
    assert "quarantined" in done.out
    assert done.err.startswith("mmunotify: driver 'broken' of broken-driver 1.2")
    assert done.err.count("\n") == 1


def test_check_a_good_driver(mmunotify: CommandLine) -> None:
    """Everything that is known of it; markup in it is only text."""
    mmunotify.install("good")
    done = mmunotify("drivers", "check", "good")
    assert (done.status, done.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines() if len(line.split()) > 1)
    assert {key: value.strip() for key, value in rows.items()} == {
        "name": "good",
        "summary": "in [brackets]",
        "version": "1.2",
        "distribution": "good-driver",
        "spec": "good_driver:DRIVER",
        "api": "1.0",
        "capabilities": "atomic",
        "options": "size",
        "state": "loaded",
    }


def test_check_holds_the_class_to_the_contract(mmunotify: CommandLine) -> None:
    """A misspelled callback loads, and is found here."""
    mmunotify.install("typo", SPEC.replace("    pass", "    def relaese(self): ..."))
    assert "quarantined" not in mmunotify("drivers", "list").out
    done = mmunotify("drivers", "check", "typo")
    assert done.status == 1
    assert "quarantined" in done.out
    assert "did you mean release?" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("drivers", "check", "godo"), "mmunotify: no driver 'godo': did you mean 'good'?\n"),
        (("drivers", "check"), 'mmunotify: Command "drivers check" parameter NAME requires'),
        (("drivers", "chek"), 'mmunotify: Unknown command "chek". Did you mean "check"?'),
    ],
)
def test_mistakes_are_one_line(
    mmunotify: CommandLine, arguments: tuple[str, ...], error: str
) -> None:
    """What was wrong and what to do; with --debug the traceback."""
    mmunotify.install("good")
    done = mmunotify(*arguments)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(error)
    assert done.err.count("\n") == 1
    assert "Traceback" in mmunotify("--debug", *arguments).err


def test_help_names_every_command(mmunotify: CommandLine) -> None:
    """Each with what it is for."""
    done = mmunotify("--help")
    assert done.status == 0
    for command in ("drivers", "explore"):
        (line,) = (line for line in done.out.splitlines() if command in line)
        assert len(line.split()) > 5
