"""`mmunotify explore`, run as a command."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = (sys.executable, "-m", "mmunotify", "explore")
BANK = """
import anyio
from anyio.lowlevel import checkpoint
from mmunotify.testing.explore import choose, fault_point

async def deposits(lock):
    balance = 0

    async def deposit():
        nonlocal balance
        async with lock:
            seen = balance
            await checkpoint()
            balance = seen + 10

    async with anyio.create_task_group() as tg:
        tg.start_soon(deposit, name="alice")
        tg.start_soon(deposit, name="bob")
    return balance

async def right():
    return await deposits(anyio.Lock())

async def wrong():
    assert await deposits(anyio.Semaphore(2)) == 20

async def needs_options():
    with anyio.move_on_after(5):
        await checkpoint()
        try:
            fault_point("disk.read")
        except Exception:
            async def hangs():
                try:
                    await anyio.sleep(1)
                except BaseException:
                    raise ValueError("all at once")

            async with anyio.create_task_group() as tg:
                tg.start_soon(hangs, name="hangs")

async def many():
    return choose(*range(100))

async def endless():
    async def spin():
        for _ in range(30):
            await checkpoint()

    async with anyio.create_task_group() as tg:
        for _ in range(5):
            tg.start_soon(spin)

def plain():
    pass

async def takes(something):
    pass
"""


def run(directory: Path, *arguments: str, status: int = 0) -> str:
    (directory / "bank.py").write_text(BANK)
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=directory
    )
    assert done.returncode == status, done.stderr
    return done.stdout or done.stderr


def test_right_program_is_exhausted(tmp_path: Path) -> None:
    first, second = run(tmp_path, "bank:right").splitlines()
    assert first.startswith("DFS(): 6 schedules, exhausted; 11 states, 1 outcome, 0 failures")
    assert second == "         6 x 20"


def test_the_command_that_is_printed_shows_the_failure_again(tmp_path: Path) -> None:
    shown = run(tmp_path, "bank:wrong", status=1)
    assert "AssertionError" in shown
    assert "alice" in shown
    assert "seen = balance" in shown
    command = shlex.split(shown.splitlines()[-1].partition("to see it again: ")[2])
    assert command[:4] == ["mmunotify", "explore", "bank:wrong", "--replay"]
    again = run(tmp_path, *command[2:], status=1)
    assert again.splitlines()[3:-1] == shown.splitlines()[4:-1]


def test_it_has_the_options_that_the_schedule_is_for(tmp_path: Path) -> None:
    options = ["--cancel", "hang*", "--fault", "disk.*=1", "--time", "choice"]
    shown = run(tmp_path, "bank:needs_options", *options, status=1)
    assert "ValueError: all at once" in shown
    command = shlex.split(shown.splitlines()[-1].partition("to see it again: ")[2])
    assert command[5:] == options
    assert "ValueError: all at once" in run(tmp_path, *command[2:], status=1)


@pytest.mark.parametrize("strategy", ["dfs", "sleep-sets", "random", "pct", "hypothesis"])
def test_every_strategy_finds_it(tmp_path: Path, strategy: str) -> None:
    shown = run(tmp_path, "bank:wrong", "--strategy", strategy, "--schedules", "500", status=1)
    assert shown.splitlines()[-1].endswith("--replay 001")


def test_many_outcomes_are_cut(tmp_path: Path) -> None:
    lines = run(tmp_path, "bank:many").splitlines()
    assert len(lines) == 22
    assert lines[-1].strip() == "and 80 other outcomes"


def test_options_without_effect_are_named(tmp_path: Path) -> None:
    shown = run(tmp_path, "bank:right", "--cancel", "alicia", "--fault", "disc")
    assert "cancel='alicia' met nothing of that name" in shown
    assert "faults='disc' met nothing of that name" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bank"], "'bank' names no scenario: expected MODULE:FUNCTION"),
        (["bank:nothing"], "bank has no 'nothing': expected MODULE:FUNCTION"),
        (["bnak:right"], "there is no module 'bnak', here or installed: expected MODULE:FUNCTION"),
        (
            ["bank.py:right"],
            (
                "there is no module 'bank.py', here or installed: expected MODULE:FUNCTION, "
                "without the .py"
            ),
        ),
        (["bank:plain"], "bank:plain is no scenario: expected a function of `async def`"),
        (
            ["bank:takes"],
            "takes is called without arguments: missing a required argument: 'something'",
        ),
        (["bank:right", "--fault", "disk=x"], "--fault disk=x: expected NAME or NAME=N"),
        (["bank:right", "--schedules", "0"], "schedules=0, expected a number above 0"),
        (
            ["bank:right", "--strategy", "pct", "--preemptions", "2"],
            "--preemptions: expected --strategy dfs, found pct",
        ),
        (
            ["bank:right", "--replay", "?"],
            (
                "'?' is no schedule: expected a digit, a letter or (NUMBER), each perhaps with "
                "{TIMES} behind it, at '?'"
            ),
        ),
        (
            ["bank:right", "--replay", "9"],
            (
                "choice 0 of the schedule '9' is option 9, but there are 2: it belongs to another "
                "scenario, or to other options of explore()"
            ),
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert run(tmp_path, *arguments, status=1) == f"mmunotify: {message}\n"


def test_ctrl_c_says_how_far_it_went(tmp_path: Path) -> None:
    (tmp_path / "bank.py").write_text(BANK)
    with subprocess.Popen(
        [*COMMAND, "interrupts:me"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as running:
        (tmp_path / "interrupts.py").write_text(
            "import os, signal, bank\n"
            "runs = 0\n"
            "async def me():\n"
            "    global runs\n"
            "    runs += 1\n"
            "    if runs == 1_000:\n"
            f"        os.kill(os.getpid(), {int(signal.SIGINT)})\n"
            "    await bank.endless()\n"
        )
        shown, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert shown.startswith("interrupted: DFS() within fairness = 32: ")
    assert "schedules, not exhausted" in shown
