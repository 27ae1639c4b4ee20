"""Whether the model announced what the kernel did: range by range, in order, per address space."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, TypeAlias

from mmunotify import PAGE_SIZE, AtomicDriver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmunotify import Range

Span: TypeAlias = tuple[int, int]
"""What an announcement is compared by: start and end in bytes."""


class Witness(AtomicDriver):
    """Appends every announcement of one address space to a list that its owner empties."""

    def __init__(self, heard: list[Span]) -> None:
        self._heard = heard

    def invalidate_range_start(self, rng: Range) -> None:
        """Note the range."""
        self._heard.append((rng.start, rng.end))


class Matches:
    """How many of the kernel's announcements the model has made too."""

    def __init__(self) -> None:
        self.kernel = 0
        """Announcements of the recording, made inside system calls and faults."""
        self.matched = 0
        """Those that the model made in the same operation, with an equal range, in order."""
        self.extra = 0
        """Announcements of the model, in operations that were recorded, that the kernel did not."""
        self.missing: Final[Counter[str]] = Counter()
        """By operation: announcements of the kernel that the model did not make."""
        self.surplus: Final[Counter[str]] = Counter()
        """By operation: those counted in `extra`."""

    def copied(self, start: int, pages: int, model: Sequence[Span]) -> None:
        """Count faults on pages in a row, in each of which the kernel announced its page."""
        if pages == 1 == len(model) and model[0] == (start, start + PAGE_SIZE):
            self.kernel += 1
            self.matched += 1
            return
        end = start + pages * PAGE_SIZE
        self.compare("fault", [(at, at + PAGE_SIZE) for at in range(start, end, PAGE_SIZE)], model)

    def compare(self, operation: str, kernel: Sequence[Span], model: Sequence[Span]) -> None:
        """Count what one operation announced on either side."""
        common = len(kernel) if kernel == model else _longest_common(kernel, model)
        self.kernel += len(kernel)
        self.matched += common
        self.extra += len(model) - common
        if common < len(kernel):
            self.missing[operation] += len(kernel) - common
        if common < len(model):
            self.surplus[operation] += len(model) - common


def _longest_common(one: Sequence[Span], other: Sequence[Span]) -> int:
    """The length of the longest common subsequence."""
    if not one or not other:
        return 0
    first = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
                 min(len(one), len(other)))  # fmt: skip
    one, other = one[first:], other[first:]
    row = [0] * (len(other) + 1)
    for mine in one:
        corner = 0
        for index, theirs in enumerate(other, 1):
            above = row[index]
            row[index] = corner + 1 if mine == theirs else max(above, row[index - 1])
            corner = above
    return first + row[-1]
