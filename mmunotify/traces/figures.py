"""The numbers of a replay, as one flat object: what is printed, written and drawn is this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmunotify import SpinLocks

if TYPE_CHECKING:
    from .meters import Meter
    from .replay import Design, Replay

COUNTERS = ("installed", "mapped", "flushes", "refaults", "retries")
"""What a device may count (`mmunotify.Device`)."""


def design_figures(design: Design) -> dict[str, Any]:
    """A design by the words that the command line takes."""
    return {
        "drivers": [choice.name for choice in design.drivers],
        "locks": "spin" if design.locks is SpinLocks else "rwsem",
        "batching": design.batching,
        "era": design.era,
        "device": str(design.touching),
    }


def driver_figures(meter: Meter) -> dict[str, Any]:
    """One driver's costs; a counter that its device does not keep is None.

    `counters` are those that only this driver has, without what it never counted.
    """
    counters = meter.counters
    known = {name: counters.get(name, 0) if meter.is_device else None for name in COUNTERS}
    own = {name: count for name, count in counters.items() if count and name not in COUNTERS}
    return {
        "driver": meter.name,
        "kind": meter.kind.__name__.removesuffix("Driver").lower(),
        "callbacks": dict(sorted(meter.calls.items())),
        "pages": meter.pages,
        **known,
        "counters": own,
        "callback_seconds": meter.ns / 1e9,
        "latencies": {bits: count for bits, count in enumerate(meter.latencies) if count},
    }


def figures(replay: Replay) -> dict[str, Any]:
    """Everything that is known of a replay, at its end or on the way."""
    recording, matches = replay.recording, replay.matches
    return {
        "recording": recording.name,
        "command": " ".join(recording.header.command),
        "design": design_figures(replay.design),
        "events": replay.events,
        "recorded_events": recording.header.events,
        "lost": recording.header.lost,
        "truncated": recording.truncated,
        "stopped": replay.stopped,
        "recorded_seconds": replay.recorded_seconds,
        "replay_seconds": replay.replay_seconds,
        "kernel_announcements": matches.kernel,
        "matched": matches.matched,
        "extra": matches.extra,
        "given": replay.given,
        "aged": replay.aged,
        "inferred": replay.inferred,
        "signals": replay.signals,
        "missing": dict(matches.missing.most_common()),
        "surplus": dict(matches.surplus.most_common()),
        "unexplained": dict(replay.unexplained.most_common()),
        "drivers": [driver_figures(meter) for meter in replay.meters],
    }
