"""A replay over time, for a report: what was announced when, and how the memory looked."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from mmunotify.model import flags as f

from .matching import Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mmunotify import Range
    from mmunotify.model.vma import Vma

    from .matching import Span
    from .recording import Header
    from .tasks import Space

    Layout: TypeAlias = tuple[tuple[int, int, str], ...]

_COLUMNS: Final = 96
_LOOKS: Final = 48


class History:
    """Counts announcements by time, reason and size, and looks at the mappings now and then."""

    def __init__(self, header: Header) -> None:
        whole = max(1, header.wall_ms) * 1000
        self.column: Final = max(1, whole // _COLUMNS)
        """Microseconds that one column of a plot stands for."""
        self.due = 0
        """The next time to look, in microseconds."""
        self._between: Final = max(1, whole // _LOOKS)
        self._reasons: Final[defaultdict[str, Counter[int]]] = defaultdict(Counter)
        self._sizes: Final[Counter[int]] = Counter()
        self._told: Final[Counter[str]] = Counter()
        self._layouts: Final[defaultdict[str, list[tuple[int, Layout]]]] = defaultdict(list)

    def announced(self, name: str, now: int, rng: Range) -> None:
        """Count one announcement."""
        self._reasons[rng.event.name][now // self.column] += 1
        self._sizes[(rng.pages - 1).bit_length()] += 1
        self._told[name] += 1

    def look(self, now: int, spaces: Iterable[Space]) -> None:
        """Note how the memory of everybody is laid out."""
        self.due = now + self._between
        for space in spaces:
            layout = tuple((vma.start, vma.end, _kind(vma)) for vma in space.mm.vmas)
            self._layouts[space.mm.name].append((now, layout))

    def figures(self) -> dict[str, Any]:
        """What was seen, as plain data: times in microseconds, sizes as the log2 of pages."""
        shown = max(self._layouts, key=lambda name: self._told[name], default="")
        return {
            "column": self.column,
            "reasons": {name: dict(sorted(when.items())) for name, when in self._reasons.items()},
            "sizes": dict(sorted(self._sizes.items())),
            "space": shown,
            "announced": self._told[shown],
            "layouts": self._layouts[shown],
        }


class Watcher(Witness):
    """A witness that counts the announcements of one address space for a `History`, too."""

    def __init__(
        self, heard: list[Span], history: History, name: str, now: Callable[[], int]
    ) -> None:
        super().__init__(heard)
        self._history = history
        self._name = name
        self._now = now

    def invalidate_range_start(self, rng: Range) -> None:
        """Note and count the range."""
        super().invalidate_range_start(rng)
        self._history.announced(self._name, self._now(), rng)


def _kind(vma: Vma) -> str:
    if vma.flags & f.VM_GROWSDOWN:
        return "stack"
    if vma.flags & f.VM_SHARED:
        return "shared"
    if vma.file is None:
        return "anonymous"
    if vma.flags & f.VM_EXEC:
        return "code"
    return "file, written" if vma.anon_vma is not None else "file"
