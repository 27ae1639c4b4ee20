"""The event catalogue: what may appear in the log, under which name, with which keys.

One flat object per line, through structlog, which the application configures and the library
never does; while nobody has configured structlog, nothing below a warning is written. Rare events
go there directly. Hot ones (every section, every callback) are `Record` tuples, made only while
somebody listens: `Notifiers.trace` takes any callable, and a `Ring` keeps the latest of them until
they are wanted as dictionaries.

Every line carries `seq` (one order over all events of the process) and `ts_ns` (monotonic).
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TextIO

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.frozen
class EventSpec:
    """One kind of event: its constant name, its keys besides `seq` and `ts_ns`, its level."""

    name: str
    level: str
    keys: tuple[str, ...]
    summary: str


CATALOGUE: Final[dict[str, EventSpec]] = {}


def define_event(name: str, level: str, keys: str, summary: str) -> str:
    """Add a kind of event to the catalogue and give its name back.

    `level` is debug, info, warning or error; `keys` are names separated by spaces. A plugin starts
    the names of its events with its own. Raises ValueError for a name that means something else.
    """
    spec = EventSpec(name, level, tuple(keys.split()), summary)
    known = CATALOGUE.setdefault(name, spec)
    if known != spec:
        raise ValueError(
            f"event {name!r} is defined already: expected a name of its own, or {known}"
        )
    return name


DRIVER_REGISTERED: Final = define_event(
    "driver_registered", "info", "mm driver", "A driver became visible to an address space."
)
DRIVER_UNREGISTERED: Final = define_event(
    "driver_unregistered",
    "info",
    "mm driver",
    "Unregister or the last put is complete: no callback of the driver runs or will run.",
)
DRIVER_FAILED: Final = define_event(
    "driver_failed",
    "error",
    "mm driver module distribution callback error start end exc_info",
    "A callback raised: the driver (or one interval) is quarantined; pages leak until it leaves.",
)
WAITING_FOR_CALLBACKS: Final = define_event(
    "waiting_for_callbacks",
    "warning",
    "mm drivers reason",
    "Unregister or exit waits for callbacks that are still running, in these drivers.",
)
ADDRESS_SPACE_RELEASED: Final = define_event(
    "address_space_released",
    "info",
    "mm drivers duration_ns",
    "Exit: every driver has dropped its translations and is off the list.",
)
SECTION_REFUSED: Final = define_event(
    "section_refused",
    "warning",
    "mm driver start end reason",
    "-EAGAIN: a non-blockable section met a driver that would have to wait.",
)
TRACE_FAILED: Final = define_event(
    "trace_failed",
    "error",
    "mm error exc_info",
    "The listener of a trace raised: the trace is off, what was traced goes on.",
)
CALLBACK_RAISED: Final = define_event(
    "callback_raised",
    "error",
    "srcu callback error exc_info",
    "A callback queued by call_srcu raised; the grace period goes on.",
)
PLUGIN_QUARANTINED: Final = define_event(
    "plugin_quarantined",
    "error",
    "driver distribution version value reason",
    "A driver plugin cannot be used; the others can.",
)
INVALIDATE_RANGE: Final = define_event(
    "invalidate_range",
    "debug",
    "mm span_id parent_id phase start end reason duration_ns",
    "A section: its start is told before the ptes change, its end after.",
)
CALLBACK: Final = define_event(
    "callback",
    "debug",
    "mm driver callback span_id parent_id phase start end reason duration_ns",
    "One callback of one driver; parent_id is the section, where there is one.",
)

sequence: Final = itertools.count(1).__next__
"""The next `seq`: one order over everything that is logged or traced."""
spans: Final = itertools.count(1).__next__
"""The next `span_id`."""
current_span: Final[ContextVar[int | None]] = ContextVar("mmunotify_span", default=None)
"""The operation that sections belong to: what they carry as `parent_id`."""

_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Log:
    """Where one object's rare events go: a structlog logger with the object's keys bound.

    `logger` is the application's own for this object; by default it is structlog's, to which
    nothing below a warning is written before structlog is configured.
    """

    __slots__ = ("_configured", "_given", "_logger")

    def __init__(self, logger: Any | None = None, **keys: object) -> None:
        # Half of what `import mmunotify` would cost, asyncio and json included.
        import structlog

        self._configured = structlog.is_configured
        self._given = logger is not None
        # The default one is bound anew at each use: structlog may be configured later.
        self._logger = (
            structlog.get_logger("mmunotify", **keys) if logger is None else logger.bind(**keys)
        )

    def emit(self, event: str, **keys: object) -> None:
        """Write one event of the catalogue at its level; what a logger raises goes to stderr."""
        level = CATALOGUE[event].level
        if self._given or self._configured() or _LEVELS[level] >= _LEVELS["warning"]:
            write = getattr(self._logger, level)
            try:
                write(event, seq=sequence(), ts_ns=time.monotonic_ns(), **keys)
            except Exception:  # the application's; it must not leave a section half told
                import traceback

                traceback.print_exc()


class Record(NamedTuple):
    """One hot event; None where a key does not apply."""

    seq: int
    ts_ns: int
    event: str
    mm: str
    driver: str | None
    callback: str | None
    span_id: int
    parent_id: int | None
    phase: str
    """start, end or instant."""
    start: int
    end: int
    reason: str | None
    """The name of the Event."""
    duration_ns: int | None
    """At the end of a span: how long it took."""


class Ring:
    """The latest hot events, `capacity` of them at most: `notifiers.trace = ring.append`."""

    def __init__(self, capacity: int = 1 << 16) -> None:
        self._records: deque[Record] = deque(maxlen=capacity)
        self.append = self._records.append
        """Add a record; the oldest goes when the ring is full."""

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def clear(self) -> None:
        """Forget everything."""
        self._records.clear()

    def drain(self) -> Iterator[dict[str, object]]:
        """Take the records out, oldest first, as flat objects without the keys that are None."""
        while self._records:
            record = self._records.popleft()
            yield {key: value for key, value in record._asdict().items() if value is not None}

    def write(self, file: TextIO) -> int:
        """Drain into `file` as newline-delimited JSON; the number of lines written."""
        count = 0
        for count, line in enumerate(self.drain(), 1):  # noqa: B007
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        return count


def markdown() -> str:
    """The catalogue as the page of the documentation that `python -m mmunotify.log` prints."""
    lines = [
        "# Events",
        "",
        "Every line carries `event`, `seq` (one order over all events of the process) and `ts_ns`",
        "(monotonic). Lines at debug are the hot ones: they are `Record` tuples, made only while",
        "`Notifiers.trace` is set. A key that does not apply is left out.",
        "",
        "| event | level | keys | meaning |",
        "|---|---|---|---|",
    ]
    for spec in CATALOGUE.values():
        keys = ", ".join(f"`{key}`" for key in spec.keys)
        lines.append(f"| `{spec.name}` | {spec.level} | {keys} | {spec.summary} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
