"""What several rings have recorded, as one sequence in the order of time, in constant memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import numpy as np

from .ringbuffer import decode
from .sideband import parse
from .spool import read_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import BinaryIO

    from .ringbuffer import Bytes, Indices, Records, Words
    from .sideband import Mapped
    from .tracefs import EventFormat, PageFormat

    Row: TypeAlias = tuple[int, str, int, list[int], str | None]

_PAGES: Final = 1 << 10
"""How many pages of a ring are decoded together."""
_CHUNK: Final = 1 << 18
COLUMNS: Final = 7
"""How many numbers an event has at most."""
_BYTES: Final = {"pid": 4, "mm_id": 4, "member": 4, "pferr": 4}
"""Fields that are not of 64 bits."""


@attrs.frozen
class Kind:
    """How an event of the kernel becomes an event of a recording."""

    letter: str
    fields: tuple[str, ...] = ()
    text: str = ""
    """The field that is a string."""


KINDS: Final[Mapping[str, Kind]] = {
    "raw_syscalls/sys_enter": Kind(">", ("id", *(f"args+{8 * index}" for index in range(6)))),
    "raw_syscalls/sys_exit": Kind("<", ("id", "ret")),
    "exceptions/page_fault_user": Kind("f", ("address", "ip", "error_code")),
    "exceptions/page_fault_kernel": Kind("F", ("address", "error_code")),
    "task/task_newtask": Kind("n", ("pid", "clone_flags")),
    "sched/sched_process_exec": Kind("x", (), "filename"),
    "sched/sched_process_exit": Kind("e"),
    "kvm/kvm_unmap_hva_range": Kind("u", ("start", "end")),
    "kvm/kvm_age_hva": Kind("a", ("start", "end")),
    "kvm/kvm_test_age_hva": Kind("t", ("hva",)),
    "kvmmmu/kvm_mmu_pagetable_walk": Kind("g", ("addr", "pferr")),
    "kvmmmu/kvm_mmu_set_spte": Kind("s", ("gfn", "spte")),
    "kmem/rss_stat": Kind("m", ("mm_id", "member", "size")),
}


@attrs.define
class Events:
    """Some events in the order of time, as columns of equal length."""

    times: Words
    """Nanoseconds of CLOCK_MONOTONIC."""
    kinds: Bytes
    """Letters."""
    tids: Indices
    values: Words
    """A row of numbers for each, filled up with zeros."""
    texts: dict[int, str]
    """By index: what an event says that has no numbers."""

    def __len__(self) -> int:
        return len(self.times)

    def rows(self) -> Iterator[Row]:
        """One after the other: time, letter, task, numbers, text."""
        texts = self.texts
        rows = zip(
            self.times.tolist(),
            bytes(self.kinds).decode(),
            self.tids.tolist(),
            self.values.tolist(),
            strict=True,
        )
        for index, row in enumerate(rows):
            yield (*row, texts.get(index))

    def part(self, begin: int, end: int) -> Events:
        """Those from one index to another."""
        return Events(
            self.times[begin:end],
            self.kinds[begin:end],
            self.tids[begin:end],
            self.values[begin:end],
            {at - begin: text for at, text in self.texts.items() if begin <= at < end},
        )


def told(entries: Iterable[tuple[int, str, int, str]]) -> Events:
    """Events that were told in words: time, letter, task, text. Sorts them."""
    ordered = sorted(entries, key=lambda entry: entry[0])
    return Events(
        np.array([entry[0] for entry in ordered], np.uint64),
        np.frombuffer("".join(entry[1] for entry in ordered).encode(), np.uint8),
        np.array([entry[2] for entry in ordered], np.int64),
        np.zeros((len(ordered), COLUMNS), np.uint64),
        {index: entry[3] for index, entry in enumerate(ordered)},
    )


def mapped_text(one: Mapped) -> str:
    """A mapping as the fields of a line."""
    return f"{one.start:x} {one.end:x} {one.prot} {one.offset:x} {one.inode} {one.path}"


def side_band(spool: BinaryIO, lost: Callable[[int], object]) -> Iterator[Events]:
    """The mappings that one processor has told of; `lost` is told how many it could not."""
    spool.seek(0)
    rest = b""
    while raw := spool.read(_CHUNK):
        rest += raw
        mapped, missing, used = parse(rest)
        lost(missing)
        rest = rest[used:]
        yield told((one.time, "o", one.tid, mapped_text(one)) for one in mapped)


def ring(spool: BinaryIO, page: PageFormat, formats: Mapping[str, EventFormat]) -> Iterator[Events]:
    """What one ring has recorded, from the pages that were copied to a file."""
    spool.seek(0)
    kinds = {form.number: (KINDS[event], form) for event, form in formats.items()}
    while raw := read_pages(spool, page, _PAGES):
        yield _events(decode(raw, page.size, page.data), kinds)


def _events(records: Records, kinds: Mapping[int, tuple[Kind, EventFormat]]) -> Events:
    every = np.arange(len(records))
    numbers = records.u32(0, every) & np.uint64(0xFFFF)
    letters = np.zeros(len(records), np.uint8)
    values = np.zeros((len(records), COLUMNS), np.uint64)
    texts: dict[int, str] = {}
    for number, (kind, form) in kinds.items():
        rows = np.flatnonzero(numbers == number)
        letters[rows] = ord(kind.letter)
        for column, field in enumerate(kind.fields):
            name, _, more = field.partition("+")
            offset = form.offsets[name] + int(more or 0)
            read = records.u32 if _BYTES.get(name) == 4 else records.u64
            values[rows, column] = read(offset, rows)
        if kind.text:
            for row in rows.tolist():
                raw = records.text(form.offsets[kind.text], row)
                texts[row] = raw.decode(errors="surrogateescape").replace("\n", "\\012")
    tids = records.u32(4, every).astype(np.int64)
    return Events(records.times, letters, tids, values, texts)


def merge(streams: Iterable[Iterator[Events]]) -> Iterator[Events]:
    """The events of all streams in the order of time; of equal times, the first stream's first."""
    sources = [iter(stream) for stream in streams]
    heads: list[Events | None] = [_next(source) for source in sources]
    while True:
        present = [head for head in heads if head is not None]
        if not present:
            return
        # All that comes later in any stream is later than this.
        limit = min(int(head.times[-1]) for head in present)
        parts: list[Events] = []
        for index, head in enumerate(heads):
            if head is None:
                continue
            count = int(np.searchsorted(head.times, np.uint64(limit), side="right"))
            parts.append(head.part(0, count))
            heads[index] = (
                head.part(count, len(head)) if count < len(head) else _next(sources[index])
            )
        yield _sorted(parts)


def _next(source: Iterator[Events]) -> Events | None:
    return next((events for events in source if len(events)), None)


def _sorted(parts: list[Events]) -> Events:
    columns = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("times", "kinds", "tids", "values")
    )
    times, kinds, tids, values = columns
    order = np.argsort(times, kind="stable")
    texts: dict[int, str] = {}
    if any(part.texts for part in parts):
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        first = 0
        for part in parts:
            for index, text in part.texts.items():
                texts[int(places[first + index])] = text
            first += len(part)
    return Events(times[order], kinds[order], tids[order], values[order], texts)
