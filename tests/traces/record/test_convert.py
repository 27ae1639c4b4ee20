"""Recordings made of what strace and perf script have written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify.errors import RecordingError
from mmunotify.traces.decode import Call, Mapping
from mmunotify.traces.figures import figures
from mmunotify.traces.record.convert import convert
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Design, Replay

if TYPE_CHECKING:
    from pathlib import Path

    from mmunotify.traces.record.convert import Converted

STRACE = """\
100  1000.000010 execve("/bin/sh", ["sh", "-c", "a, b"], 0x7ffd /* 3 vars */) = 0 <0.000090>
100  1000.000200 brk(NULL) = 0x5000 <0.000001>
100  1000.000300 openat(AT_FDCWD</tmp>, "lib (1).so", O_RDONLY|O_CLOEXEC) = 3</tmp/lib (1).so>
100  1000.000400 mmap(NULL, 5000, PROT_READ|PROT_EXEC, MAP_PRIVATE|MAP_DENYWRITE, 3</tmp/lib (1).so>, 0x1000) = 0x7f0000000000
100  1000.000500 close(3</tmp/lib (1).so>) = 0
100  1000.000600 mmap(NULL, 8192, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_ANONYMOUS, -1, 0) = 0x7f0000100000
100  1000.000700 clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|CLONE_CHILD_SETTID|SIGCHLD <unfinished ...>
101  1000.000710 madvise(0x7f0000100000, 4096, MADV_DONTNEED <unfinished ...>
100  1000.000720 <... clone resumed>, child_tidptr=0x7f0000200000) = 101
101  1000.000730 <... madvise resumed>) = 0
100  1000.000740 munmap(0x10001, 4096) = -1 EINVAL (Invalid argument)
101  1000.000750 exit_group(0) = ?
101  1000.000760 +++ exited with 0 +++
100  1000.000770 --- SIGCHLD {si_signo=SIGCHLD, si_code=CLD_EXITED} ---
100  1000.000780 mbind(0x1000, 4096, MPOL_WEIRD, NULL, 0, 0) = 0
100  1000.000790 exit_group(0) = ?
100  1000.000800 +++ exited with 0 +++
"""  # noqa: E501 - as strace writes it

PERF = """\
       perf-exec     0 [000]     0.000000: PERF_RECORD_COMM: perf-exec:200/200
            bash 200 [001]  3283.000001: PERF_RECORD_COMM exec: bash:200/200
            bash 200 [001]  3283.000002: PERF_RECORD_MMAP2 200/200: [0x7ffe00000000(0x21000) @ 0x7ffffffde000 00:00 0 0]: rw-p [stack]
            bash 200 [001]  3283.000003: PERF_RECORD_MMAP2 200/200: [0x55e700000000(0x2000) @ 0x1000 fe:00 26 0]: r-xp /usr/bin/a b
            bash 200 [001]  3283.000004: exceptions:page_fault_kernel: address=0x55e700001764 ip=rep_stos error_code=0x2
            bash 200 [001]  3283.000005: kmem:rss_stat: mm_id=99 curr=1 type=MM_ANONPAGES size=8192B
            bash 200 [001]  3283.000006:     sched:sched_process_exec: filename=/usr/bin/a b pid=200 old_pid=200
            bash 200 [001]  3283.000007:        raw_syscalls:sys_exit: NR 59 = 0
            bash 200 [001]  3283.000008:   exceptions:page_fault_user: address=0x55e700000b70 ip=0x55e700000b70 error_code=0x14
            bash 200 [001]  3283.000009: raw_syscalls:sys_enter: NR 11 (55e700000000, 1000, 0, 0, 0, 0)
            bash 200 [001]  3283.000010: kvm:kvm_unmap_hva_range: mmu notifier unmap range: 0x55e700000000 -- 0x55e700001000
            bash 200 [001]  3283.000011: raw_syscalls:sys_exit: NR 11 = 0
            bash 200 [001]  3283.000012: raw_syscalls:sys_enter: NR 57 (0, 0, 0, 0, 0, 0)
            bash 200 [001]  3283.000012: kvm:kvm_unmap_hva_range: mmu notifier unmap range: 0x7ffe00000000 -- 0x7ffe00021000
            bash 200 [001]  3283.000013: kmem:rss_stat: mm_id=7 curr=0 type=MM_ANONPAGES size=4096B
            bash 200 [001]  3283.000014: PERF_RECORD_FORK(201:201):(200:200)
            bash 200 [001]  3283.000015: raw_syscalls:sys_exit: NR 57 = 201
            bash 201 [000]  3283.000016: sched:sched_process_exit: comm=bash pid=201 prio=120
            bash 201 [000]  3283.000017: kmem:rss_stat: mm_id=7 curr=0 type=MM_ANONPAGES size=0B
         kswapd0  66 [000]  3283.000017: kvm:kvm_unmap_hva_range: mmu notifier unmap range: 0x7ffe00001000 -- 0x7ffe00002000
         kswapd0  66 [000]  3283.000018: kmem:rss_stat: mm_id=7 curr=0 type=MM_ANONPAGES size=0B
         kswapd0  66 [000]  3283.000019: kvm:kvm_unmap_hva_range: mmu notifier unmap range: 0x7ffe00001000 -- 0x7ffe00002000
         kswapd0  66 [000]  3283.000020: kmem:rss_stat: mm_id=8 curr=0 type=MM_ANONPAGES size=-4096B
            bash 200 [001]  3283.000021: sched:sched_switch: prev_comm=bash
            bash 200 [001]  3283.000022: sched:sched_process_exit: comm=bash pid=200 prio=120
"""  # noqa: E501 - as perf writes it


def converted(tmp_path: Path, text: str) -> tuple[Converted, Path]:
    source, output = tmp_path / "text", tmp_path / "out.mmt"
    source.write_text(text)
    return convert(source, output), output


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


def replayed(path: Path) -> dict[str, Any]:
    replay = Replay(Recording(path), Design())
    anyio.run(replay.run)
    return figures(replay)


def test_what_strace_says_is_written_down(tmp_path: Path) -> None:
    done, path = converted(tmp_path, STRACE)
    assert (done.source, done.notes) == ("strace", {"unknown constant MPOL_WEIRD": 1})
    header = Recording(path).header
    assert (header.command, header.root, header.vm) == (("/bin/sh", "-c", "a, b"), 100, False)
    assert lines(path) == [
        "0 > 100 execve ",
        "90 x 100 /bin/sh",
        "0 < 100 execve 0",
        "100 > 100 brk 0",
        "1 < 100 brk 5000",
        "99 > 100 openat ffffff9c 0 80000 0",
        "0 < 100 openat 3",
        "100 > 100 mmap 0 1388 5 802 3 1000",
        "0 o 100 7f0000000000 7f0000002000 r-xp 1000 0 /tmp/lib (1).so",
        "0 < 100 mmap 7f0000000000",
        "100 > 100 close 3",
        "0 < 100 close 0",
        "100 > 100 mmap 0 2000 3 21 ffffffff 0",
        "0 o 100 7f0000100000 7f0000102000 rw-s 0 0 //anon",
        "0 < 100 mmap 7f0000100000",
        "100 > 100 clone 1200011 0 0 0 0",
        "0 n 100 101 1200011",
        "10 > 101 madvise 7f0000100000 1000 4",
        "10 < 100 clone 65",
        "10 < 101 madvise 0",
        "10 > 100 munmap 10001 1000",
        "0 < 100 munmap ffffffffffffffea",
        "10 > 101 exit_group 0",
        "10 e 101",
        "20 > 100 mbind 1000 1000 0 0 0 0",
        "0 < 100 mbind 0",
        "10 > 100 exit_group 0",
        "10 e 100",
    ]


def test_what_strace_says_can_be_replayed(tmp_path: Path) -> None:
    _, path = converted(tmp_path, STRACE)
    found = replayed(path)
    assert found["events"] == len(lines(path))
    assert found["unexplained"] == {}


def test_without_options_strace_names_no_task_and_no_file(tmp_path: Path) -> None:
    text = (
        '1.000001 execve("/a", ["a"], 0x1 /* 1 var */) = 0\n'
        '1.000002 open("/lib/b", O_RDONLY) = 3\n'
        "1.000003 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = 0x7f0000000000\n"
        "1.000004 vfork(strace: Process 8 attached\n"
        " <unfinished ...>\n"
    )
    with pytest.raises(RecordingError, match=r"text:5: expected a line of `strace -f -ttt`"):
        converted(tmp_path, text)
    _, path = converted(tmp_path, "".join(text.splitlines(keepends=True)[:3]))
    assert Recording(path).header.root == 1
    assert "0 o 1 7f0000000000 7f0000001000 r--p 0 0 /lib/b" in lines(path)


def test_what_perf_says_is_written_down(tmp_path: Path) -> None:
    done, path = converted(tmp_path, PERF)
    assert (done.source, done.notes) == ("perf", {"sched:sched_switch": 1})
    header = Recording(path).header
    assert (header.command, header.root, header.vm) == (("bash",), 200, True)
    assert lines(path) == [
        "0 > 200 execve ",
        "0 o 200 7ffe00000000 7ffe00021000 rw-p 0 0 [stack]",
        "1 o 200 55e700000000 55e700002000 r-xp 1000 26 /usr/bin/a b",
        "1 F 200 55e700001764 2",
        "2 x 200 /usr/bin/a b",
        "1 < 200 execve 0",
        "1 f 200 55e700000b70 55e700000b70 14",
        "1 > 200 munmap 55e700000000 1000",
        "1 u 200 55e700000000 55e700001000",
        "1 < 200 munmap 0",
        "1 > 200 fork ",
        "0 u 200 7ffe00000000 7ffe00021000",
        "1 m 200 7 1 4096",
        "2 n 200 201 0",
        "0 < 200 fork c9",
        # It has ended when it counts no memory any more.
        "2 e 201",
        "0 u 66 7ffe00001000 7ffe00002000",
        "1 m 66 7 1 0",
        # The next one is about memory that has the same address, and is somebody else's.
        "4 e 200",
    ]


def test_what_perf_says_can_be_replayed(tmp_path: Path) -> None:
    _, path = converted(tmp_path, PERF)
    found = replayed(path)
    assert (found["kernel_announcements"], found["matched"], found["extra"]) == (2, 2, 0)


@pytest.mark.parametrize("text", ["", "hello\n", "#{}\n1 e 7\n"])
def test_anything_else_is_an_error_that_says_what_was_expected(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecordingError, match=r"text:1: expected a line of `strace -f -ttt` or"):
        converted(tmp_path, text)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    _, path = converted(tmp_path, PERF)
    (block,) = Recording(path).blocks()
    assert Mapping(0x55E700000000, 0x55E700002000, "r-xp", 0x1000, 26, "/usr/bin/a b") in (
        block.texts.values()
    )
    assert Call("munmap", (0x55E700000000, 0x1000)) in block.texts.values()
