"""The sequence count: a reader learns of every writer that was inside meanwhile."""

from __future__ import annotations

import pytest

from mmunotify.errors import LockNotHeld, SpinlockHeld
from mmunotify.locks import SeqCount

pytestmark = pytest.mark.usefixtures("both_forms")


@pytest.fixture
def count() -> SeqCount:
    return SeqCount("mm_seq")


def test_no_writer_no_retry(count: SeqCount) -> None:
    with count.writing():
        pass
    seq = count.read_begin()
    assert not count.read_retry(seq)


def test_a_writer_in_between_means_retry(count: SeqCount) -> None:
    seq = count.read_begin()
    with count.writing():
        assert count.read_retry(seq)
    assert count.read_retry(seq)


def test_begun_inside_a_writer_means_retry(count: SeqCount) -> None:
    with count.writing():
        seq = count.read_begin()
        assert count.read_retry(seq)
    assert count.read_retry(seq)
    assert not count.read_retry(count.read_begin())


def test_begin_and_end(count: SeqCount) -> None:
    count.write_begin()
    assert count.statistics().sequence == 1
    with pytest.raises(SpinlockHeld, match="mm_seq"):
        count.write_begin()
    count.write_end()
    with pytest.raises(LockNotHeld, match="mm_seq"):
        count.write_end()
    assert count.statistics().sequence == 2
    assert repr(count) == "<SeqCount 'mm_seq' 2>"


def test_an_exception_ends_the_write_section(count: SeqCount) -> None:
    seq = count.read_begin()
    with pytest.raises(ZeroDivisionError), count.writing():
        raise ZeroDivisionError
    assert count.read_retry(seq)
    assert count.sequence == 2
