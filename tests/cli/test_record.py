"""`mmunotify record`, run as a command on this machine, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from machine import needs, needs_announcements, needs_kernel, tracing_state
from mmunotify.cli.record import record as record_command
from mmunotify.errors import RecorderError
from mmunotify.traces.figures import figures
from mmunotify.traces.record.shim import build
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Design, Replay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MMUNOTIFY = (sys.executable, "-m", "mmunotify")


def run(*arguments: object, status: int = 0, **options: Any) -> str:
    """`mmunotify record` with these arguments; what it said on standard error."""
    done = subprocess.run(
        [*MMUNOTIFY, "record", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **options,
    )
    said: str = done.stderr
    assert done.returncode == status, said
    return said


def record(path: Path, *command: str, status: int = 0) -> str:
    return run("-o", path, "--", *command, status=status)


def header(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text().partition("\n")[0][1:])
    return found


def lines(path: Path, kind: str) -> list[list[str]]:
    """The events of one kind, without the time."""
    words = (line.split(" ") for line in path.read_text().splitlines()[1:])
    return [rest for _, found, *rest in words if found == kind]


@pytest.fixture
def machine_as_before() -> Iterator[None]:
    """The machine's tracing is left as it was found."""
    before = tracing_state()
    yield
    assert tracing_state() == before


def replayed(path: Path) -> dict[str, Any]:
    """The figures of a replay without a driver."""
    replay = Replay(Recording(path), Design())
    anyio.run(replay.run)
    return figures(replay)


@needs_announcements
def test_a_recorded_python_replays_as_the_kernel_announced_it(tmp_path: Path) -> None:
    path = tmp_path / "py.mmt.xz"
    program = (
        "import mmap, os\n"
        "heap = bytearray(b'x') * (4 << 20)\n"
        "told, tell = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.read(told, 1)\n"
        "else:\n"
        "    heap[::4096] = b'y' * (len(heap) // 4096)\n"
        "    os.write(tell, b'.')\n"
        "    os.waitpid(child, 0)\n"
        "    area = mmap.mmap(-1, 1 << 20)\n"
        "    area.write(bytes(1 << 20))\n"
        "    area.madvise(mmap.MADV_DONTNEED)\n"
    )
    record(path, sys.executable, "-c", program)
    found = replayed(path)
    # Each page of the heap was copied once at least, since the child has it too.
    assert found["kernel_announcements"] > 1024
    assert found["matched"] >= 0.99 * found["kernel_announcements"]
    assert found["extra"] <= 0.01 * found["kernel_announcements"]
    assert not found["truncated"]


@pytest.mark.long
@needs_announcements
@pytest.mark.usefixtures("machine_as_before")
def test_the_exit_status_is_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "sh.mmt"
    record(path, "sh", "-c", "exit 7", status=7)
    first = header(path)
    assert (first["status"], first["cmd"]) == (7, ["sh", "-c", "exit 7"])
    assert (first["format"], first["vm"], sum(first["lost"])) == (1, True, 0)


@needs_kernel
@pytest.mark.usefixtures("machine_as_before")
@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143)])
def test_a_signal_ends_the_command_and_the_recording_is_whole(
    tmp_path: Path, name: str, status: int
) -> None:
    path = tmp_path / "sleep.mmt"
    record(path, "bash", "-c", f"kill -{name} $PPID; exec sleep 50", status=status)
    assert not Recording(path).truncated
    assert lines(path, "e")
    assert os.listdir(tmp_path) == ["sleep.mmt"]


@pytest.mark.long
@needs_kernel
def test_the_second_signal_ends_the_recording_before_the_command(tmp_path: Path) -> None:
    path, fifo = tmp_path / "stubborn.mmt", tmp_path / "fifo"
    os.mkfifo(fifo)
    # Its output is closed, so that nobody waits for that.
    program = "exec >&- 2>&-; trap '' TERM; kill -TERM $PPID; sleep 0.3; kill -TERM $PPID; read <$0"
    said = run("-o", path, "--", "bash", "-c", program, fifo, status=143)
    assert "still runs" in said
    assert lines(path, "f")
    # What it may still start needs the shim to be there.
    assert any(path.name.startswith("mmunotify-") for path in tracing_state()["orphans"][1])
    fifo.open("w").close()
    run("--cleanup")


@needs_kernel
@pytest.mark.usefixtures("machine_as_before")
def test_what_a_killed_recorder_leaves_is_cleaned_up(tmp_path: Path) -> None:
    path = tmp_path / "killed.mmt"
    before = tracing_state()
    record(path, "bash", "-c", "kill -KILL $PPID", status=-9)
    assert tracing_state() != before
    said = run("--cleanup")
    assert "removed tracefs instance mmunotify-" in said
    assert "nothing to remove" in run("--cleanup")
    assert os.listdir(tmp_path) == []


@pytest.mark.long
@needs_kernel
@pytest.mark.usefixtures("machine_as_before")
def test_a_second_recorder_is_named_and_both_record(tmp_path: Path) -> None:
    inner = [*MMUNOTIFY, "record", "-o", str(tmp_path / "inner.mmt"), "--", "true"]
    said = record(tmp_path / "outer.mmt", *inner)
    assert "is recording too" in said
    assert lines(tmp_path / "inner.mmt", "x")[0][1].endswith("/true")
    assert any(words[1].endswith("/true") for words in lines(tmp_path / "outer.mmt", "x"))


@needs_kernel
@pytest.mark.usefixtures("machine_as_before")
def test_what_finds_no_room_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "lossy.mmt"
    # The recorder is stopped while its command does more than the rings can hold.
    program = (
        "import mmap, os, signal\n"
        "recorder = os.getppid()\n"
        "os.kill(recorder, signal.SIGSTOP)\n"
        "mmap.mmap(-1, 200 << 20).write(bytes(200 << 20))\n"
        "os.kill(recorder, signal.SIGCONT)\n"
    )
    said = run("-o", path, "--buffer", 1, "--", sys.executable, "-c", program)
    lost = sum(header(path)["lost"])
    assert lost > 10_000
    assert f"{lost:,} events were lost" in said
    assert Recording(path).header.lost == lost


@needs_kernel
@pytest.mark.usefixtures("machine_as_before")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        said = record(disk / "full.mmt", "sh", "-c", "ls -lR /usr/lib >/dev/null", status=1)
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert "full.mmt: cannot be written: No space left on device" in said
    assert "Traceback" not in said


@needs_kernel
@pytest.mark.parametrize(
    ("words", "output", "message"),
    [
        (("no-such-program",), "x.mmt", r"no-such-program: expected a program, found none"),
        (("/etc/passwd",), "x.mmt", r"/etc/passwd: .* found a file that is not executable"),
        (("true",), "no/such/place.mmt", r"place.mmt: cannot be written: No such file"),
        ((), "x.mmt", r"expected a command: mmunotify record -o FILE"),
        (("true",), None, r"expected -o FILE"),
    ],
)
def test_what_cannot_be_recorded_says_what_was_expected(
    words: tuple[str, ...], output: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecorderError, match=message):
        record_command(*words, output=tmp_path / output if output else None)
    assert os.listdir(tmp_path) == []


def test_a_cleanup_records_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecorderError, match="--cleanup: expected no command"):
        record_command("true", cleanup=True)


@pytest.mark.long
@needs_kernel
@pytest.mark.usefixtures("machine_as_before")
def test_a_command_that_vanishes_before_it_runs_is_one_clear_line(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    said = record(tmp_path / "x.mmt", str(script), status=1)
    assert said.splitlines() == [f"mmunotify: {script}: cannot be run: No such file or directory"]
    assert os.listdir(tmp_path) == ["script"]


@needs_announcements
@needs("cc")
@pytest.mark.usefixtures("machine_as_before")
def test_programs_that_cannot_be_followed_are_named(tmp_path: Path) -> None:
    source = tmp_path / "quiet.c"
    # With an argument it makes a child behind the back of the C library.
    source.write_text(
        "#include <signal.h>\n#include <sys/syscall.h>\n#include <sys/wait.h>\n"
        "#include <unistd.h>\n"
        "int main(int count, char **words) {\n"
        "    if (count > 1 && syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) == 0) _exit(0);\n"
        "    wait(0);\n    return 0;\n}\n"
    )
    static, plain, path = tmp_path / "static", tmp_path / "plain", tmp_path / "x.mmt"
    subprocess.run(["cc", "-static", "-o", static, source], check=True)
    subprocess.run(["cc", "-o", plain, source], check=True)
    said = record(path, "bash", "-c", f"{static}; {static}; env -i {plain}; {plain} raw")
    assert header(path)["unobserved"] == [
        [str(plain), "made by a clone that the C library did not see", 1],
        [str(plain), "started without the recorder's environment", 1],
        [str(static), "a static binary", 2],
    ]
    assert f"2 x {static}: announcements are missing (a static binary)" in said


@pytest.mark.long
@needs_announcements
@needs("setpriv")
@pytest.mark.usefixtures("machine_as_before")
def test_programs_of_other_users_are_observed(tmp_path: Path) -> None:
    path = tmp_path / "nobody.mmt"
    record(path, "setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", "exit 0")
    assert header(path)["unobserved"] == []
    assert len({words[0] for words in lines(path, "v") if words[1] == "S"}) == 1
    assert sum(words[-1].startswith("anon_inode:kvm-vcpu") for words in lines(path, "o")) == 2


@needs("strace")
def test_without_the_kernels_help_strace_records_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sh.mmt"
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert record_command("sh", "-c", "true | true; exit 3", output=path) == 3
    said = capsys.readouterr().err
    assert "not root: recorded with strace: system calls only, no page faults" in said
    assert f"{path}: " in said
    first = header(path)
    assert (first["by"], first["vm"], first["status"]) == ("strace", False, 3)
    assert len(lines(path, "n")) == len(lines(path, "e")) - 1 == 2
    found = replayed(path)
    assert found["events"] == first["events"]
    assert found["kernel_announcements"] == 0


@pytest.mark.long
@needs_announcements
@pytest.mark.usefixtures("machine_as_before")
def test_a_recorded_pipeline_replays_as_the_kernel_announced_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe.mmt"
    record(path, "bash", "-c", "ls -R /usr/lib | grep -v z | sort | awk '{print $1}' | tail -1")
    assert {words[1].rpartition("/")[2] for words in lines(path, "x")} >= {"ls", "grep", "sort"}
    assert header(path)["unobserved"] == []
    found = replayed(path)
    assert found["kernel_announcements"] > 100
    assert found["matched"] >= 0.99 * found["kernel_announcements"]
    assert found["extra"] <= 0.01 * found["kernel_announcements"]


REDIS = """
cd "$1"
redis-server --port 0 --unixsocket s --save '' --daemonize no >/dev/null &
until redis-cli -s s ping >/dev/null 2>&1; do sleep 0.05; done
fill() { seq -f "set key:%g $1$1$1$1" 30000 | redis-cli -s s --pipe >/dev/null; }
fill 0123456789
redis-cli -s s bgsave >/dev/null
fill 9876543210
until redis-cli -s s info persistence | grep -q bgsave_in_progress:0; do sleep 0.05; done
redis-cli -s s shutdown nosave
wait
test -s dump.rdb
"""


@pytest.mark.long
@needs_announcements
@needs("redis-server", "redis-cli")
@pytest.mark.usefixtures("machine_as_before")
def test_a_recorded_redis_that_saves_replays_as_the_kernel_announced_it(tmp_path: Path) -> None:
    path = tmp_path / "redis.mmt"
    data = tmp_path / "data"
    data.mkdir()
    record(path, "bash", "-c", REDIS, "redis.sh", str(data))
    found = replayed(path)
    # The server writes while its child saves, so pages are copied.
    assert found["kernel_announcements"] > 500
    assert found["matched"] >= 0.99 * found["kernel_announcements"]
    assert found["extra"] <= 0.01 * found["kernel_announcements"]


def refuse(message: str) -> Any:
    def refused(*arguments: object) -> None:
        raise RecorderError(message)

    return refused


@needs_announcements
@pytest.mark.parametrize(
    ("what", "message", "kinds"),
    [
        ("SideBand", "no perf events: mappings are recorded without their files", set("o")),
        ("shim.build", "no C compiler: what the kernel announces is not recorded", set("uatmv")),
        ("Lender", "no /dev/kvm: what the kernel announces is not recorded", set("uatmv")),
    ],
)
def test_what_is_missing_is_said_with_what_it_costs(
    what: str,
    message: str,
    kinds: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "true.mmt"
    monkeypatch.setattr(f"mmunotify.traces.record.means.{what}", refuse(message.partition(":")[0]))
    assert record_command("true", output=path) == 0
    assert capsys.readouterr().err.splitlines()[0].startswith(f"mmunotify record: {message}")
    found = {line.split(" ")[1] for line in path.read_text().splitlines()[1:]}
    assert not found & kinds
    assert found >= set("><fxe")


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_compiler_that_fails_is_said(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(RecorderError, match="shim"):
        build()
    assert list(tmp_path.glob("mmunotify/*")) == []


@needs("cc")
def test_the_shim_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build()
    monkeypatch.setenv("CC", "/bin/false")
    assert build() == first
    assert list(tmp_path.glob("mmunotify/*")) == [first]


@needs_kernel
def test_counters_are_shown_on_a_terminal(tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    command = [*MMUNOTIFY, "record", "-o", str(tmp_path / "x.mmt"), "--", "sleep", "0.3"]
    with subprocess.Popen(command, stderr=terminal) as recorder:
        os.close(terminal)
        shown = b""
        with suppress(OSError):
            while more := os.read(controller, 4096):
                shown += more
    os.close(controller)
    assert recorder.returncode == 0
    assert re.search(rb"\d\.\d s: [\d,]+ events, .*[\d,]+ MiB, 0 lost", shown)
