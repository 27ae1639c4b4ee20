"""The command, used from several shells."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMAND = (sys.executable, "-m", "mmunotify_xpmem.cli")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], text=True, capture_output=True, timeout=60, check=False
    )


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*COMMAND, *words], text=True, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_serve_list_attach_and_status(tmp_path: Path) -> None:
    """A file is exported, found, read, followed, written, and taken back."""
    file, address = tmp_path / "shared", f"unix:{tmp_path / 'socket'}"
    file.write_text("one\n" * 3000)
    with started("serve", str(file), "--writable", "--listen", address) as server:
        assert address in line(server)
        segid = line(server).split()[0]
        (row,) = json.loads(run("list", "--connect", address, "--json").stdout)
        assert (row["segid"], row["name"], row["bytes"]) == (segid, str(file), 12288)
        assert run("attach", segid, "--connect", address, "--size", "8").stdout == "one\none\n"
        words = ("attach", "shared", "--connect", address, "--size", "4", "--follow")
        with started(*words) as follower:
            assert line(follower) == "one\n"
            (report,) = json.loads(run("status", "--connect", address, "--json").stdout)
            (sharer,) = report["segments"][0]["sharers"]
            assert (sharer["pages"], sharer["unacknowledged"]) == (1, 0)
            assert "pid" in run("status", "--connect", address).stdout
            done = run("attach", segid, "--connect", address, "--write", "two\n")
            assert (done.returncode, done.stderr) == (0, "")
            assert line(follower) == "two\n"
        assert file.read_text().startswith("two\none\n")
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve",), "nothing to export"),
        (("serve", "{tmp}", "--mode", "9"), "expected octal digits"),
        (("serve", "{tmp}/missing", "--listen", "unix:{tmp}/s"), "No such file"),
        (("serve", "{tmp}/x", "--listen", "tcp:0.0.0.0:1"), "loopback"),
        (("list", "--connect", "unix:{tmp}/nobody"), "cannot connect to unix:"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    """What was wrong and what was expected; no traceback."""
    done = run(*(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
