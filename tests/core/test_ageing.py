"""Ageing: young is what anybody has used (I-AGE)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import mmunotify as mn
from recorders import Atomic

pytestmark = pytest.mark.usefixtures("both_forms")


class Ages:
    """Answers what it is told to, and writes down what it was asked."""

    def __init__(self, answer: bool, asked: list[tuple[object, ...]]) -> None:
        self.answer = answer
        self.asked = asked

    def clear_flush_young(self, start: int, end: int) -> bool:
        self.asked.append(("clear_flush_young", start, end))
        return self.answer

    def clear_young(self, start: int, end: int) -> bool:
        self.asked.append(("clear_young", start, end))
        return self.answer

    def test_young(self, address: int) -> bool:
        self.asked.append(("test_young", address))
        return self.answer


class AgesAtomic(Ages, mn.AtomicDriver):
    pass


class AgesSleepable(Ages, mn.SleepableDriver):
    pass


class AgesDeferred(Ages, mn.DeferredDriver):
    pass


KINDS: tuple[Any, ...] = (AgesAtomic, AgesSleepable, AgesDeferred)
ANSWERS = list(itertools.product([False, True], repeat=3))


async def with_answers(
    answers: tuple[bool, ...],
) -> tuple[mn.Notifiers[mn.RwSems], list[tuple[object, ...]]]:
    notifiers = mn.Notifiers()
    asked: list[tuple[object, ...]] = []
    for kind, answer in zip(KINDS, answers, strict=True):
        await notifiers.register(kind(answer, asked))
    return notifiers, asked


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("which", ["clear_flush_young", "clear_young"])
async def test_everybody_is_asked_to_clear_and_the_answers_are_ored(
    which: str, answers: tuple[bool, ...]
) -> None:
    """M14: the last answer must not win, and the first yes must not spare the others."""
    notifiers, asked = await with_answers(answers)
    assert getattr(notifiers, which)(0x1000, 0x2000) is any(answers)
    assert asked == [(which, 0x1000, 0x2000)] * 3


@pytest.mark.parametrize("answers", ANSWERS)
async def test_a_test_stops_at_the_first_that_says_yes(answers: tuple[bool, ...]) -> None:
    notifiers, asked = await with_answers(answers)
    assert notifiers.test_young(0x1234) is any(answers)
    newest_first = answers[::-1]
    expected = newest_first.index(True) + 1 if any(answers) else 3
    assert asked == [("test_young", 0x1234)] * expected


async def test_nobody_there_is_nobody_young() -> None:
    notifiers = mn.Notifiers()
    assert notifiers.clear_flush_young(0x1000, 0x2000) is False
    assert notifiers.clear_young(0x1000, 0x2000) is False
    assert notifiers.test_young(0x1000) is False


async def test_any_true_answer_is_yes() -> None:
    """Drivers count accessed bits; the sum is as good an answer as True."""
    notifiers = mn.Notifiers()
    driver = AgesAtomic(True, [])
    driver.answer = 3  # type: ignore[assignment]
    await notifiers.register(driver)
    assert notifiers.clear_flush_young(0x1000, 0x2000) is True
    assert notifiers.test_young(0x1000) is True


async def test_ageing_is_atomic_whatever_drivers_are_there() -> None:
    """Under the page table lock: a sleepable driver's ageing callbacks are plain."""
    notifiers, asked = await with_answers((False, False, False))
    lock = mn.SpinLock("page_table_lock")
    with lock:
        notifiers.clear_flush_young(0x1000, 0x2000)
        notifiers.test_young(0x1000)
    assert len(asked) == 6
    assert notifiers.statistics().open_sections == 0


async def test_ageing_is_no_section() -> None:
    notifiers = mn.Notifiers()
    driver = Atomic("a")
    await notifiers.register(driver)
    notifiers.clear_flush_young(0x1000, 0x2000)
    assert driver.told == []


async def test_who_has_left_is_not_asked() -> None:
    notifiers = mn.Notifiers()
    asked: list[tuple[object, ...]] = []
    async with notifiers.attached(AgesAtomic(True, asked)):
        assert notifiers.test_young(0x1000)
    assert not notifiers.test_young(0x1000)
    assert len(asked) == 1
