"""The filter with which the kernel chooses system calls."""

from __future__ import annotations

from mmunotify.traces.record.syscalls import BY_NUMBER, kernel_filter


def test_the_filter_lets_the_calls_pass_that_a_recording_has_and_no_others() -> None:
    python = kernel_filter().replace("&&", "and").replace("||", "or")
    passed = {number for number in range(500) if eval(python, {"id": number})}
    assert passed == BY_NUMBER.keys()
