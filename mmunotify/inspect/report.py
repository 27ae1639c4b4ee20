"""The report of some replays: one HTML file that needs nothing else, no script and no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Final

from .plots import columns, histogram, memory_map

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #e3e7ee; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2b3240; --page: #12161e }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { margin-top: 3rem; border-top: 1px solid var(--line);
  padding-top: 1.5rem } h3 { margin: 2rem 0 .3rem; font-size: 1rem }
p { color: var(--soft); margin: .2rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0 }
th, td { white-space: nowrap; padding: .2rem .8rem; border-bottom: 1px solid var(--line);
  text-align: right; font-weight: normal }
th:first-child { text-align: left; color: var(--soft); padding-left: 0 }
thead th { font-weight: 600 }
.plot, .table { overflow-x: auto }
svg { width: 100%; min-width: 42rem; height: auto; display: block }
svg text { font-size: 11px; fill: var(--soft) }
svg line { stroke: var(--line) } svg rect:hover { opacity: .7 }
.legend { list-style: none; display: flex; gap: 1.2rem; margin: 0; padding: 0; font-size: 12px;
  flex-wrap: wrap; color: var(--soft) }
.legend i { display: inline-block; width: .7em; height: .7em; margin-right: .4em }
"""
_COLOURS: Final = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2")
_ROWS: Final = (
    ("pages", "pages announced"),
    ("mapped", "really mapped"),
    ("flushes", "flushes"),
    ("installed", "translations made"),
    ("refaults", "refaults"),
    ("retries", "retries"),
)


def write_report(path: Path, replays: Iterable[dict[str, Any]]) -> None:
    """Write a page with a section for each replay, of which it takes the figures.

    Beside `mmunotify.traces.figures.figures` a replay has `history`, what its `History` saw.
    """
    path.write_text(report(replays), encoding="utf-8")


def report(replays: Iterable[dict[str, Any]]) -> str:
    """The page as text."""
    colours = "".join(
        f".s{number} {{ fill: {colour}; background: {colour} }}\n"
        for number, colour in enumerate(_COLOURS)
    )
    sections = "".join(map(_section, replays))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>mmunotify replay</title><style>{_STYLE}{colours}</style></head>\n"
        f"<body><h1>What the drivers were told</h1>{sections}</body></html>\n"
    )


def _section(found: dict[str, Any]) -> str:
    design, history = found["design"], found["history"]
    kernel = found["kernel_announcements"]
    share = f" ({found['matched'] / kernel:.2%})" if kernel else ""
    words = f"{design['locks']} locks, {design['batching']} batching, {design['era']}"
    made = f"{found['matched']:,} of them made here{share}; {found['given']:,} by others, given"
    recorded, replayed = found["recorded_seconds"], found["replay_seconds"]
    facts = [
        found["command"],
        f"{words}, devices {design['device']}",
        f"{found['events']:,} events of {recorded:.3f} s, replayed in {replayed:.3f} s",
        f"{kernel:,} announcements by the kernel in calls and faults, {made}",
    ]
    milliseconds = history["column"] / 1000
    layouts = [(when / 1000, layout) for when, layout in history["layouts"]]
    bits = [bits for row in found["drivers"] for bits in row["latencies"]]
    # The same for all, so that they can be compared at a glance.
    classes = range(min(bits), max(bits) + 1) if bits else None
    parts = [
        f"<h2>{escape(found['recording'])}</h2>",
        "".join(f"<p>{escape(fact)}</p>" for fact in facts),
        _table(found["drivers"]) if found["drivers"] else "",
        "<h3>Announcements over time</h3><p>by reason, in all address spaces</p>",
        columns("announcements over time", history["reasons"], milliseconds, recorded * 1000, "ms"),
        "<h3>How large they were</h3><p>announcements by the size of their range</p>",
        histogram("range sizes", history["sizes"], _size, "pages"),
        *(
            f"<h3>How long {escape(row['driver'])} took</h3><p>callbacks by their time</p>"
            + histogram(
                f"latency of {row['driver']}",
                row["latencies"],
                _latency,
                "less than, per callback",
                classes=classes,
            )
            for row in found["drivers"]
        ),
        f"<h3>Memory of {escape(history['space'])}</h3>",
        f"<p>the address space with the most announcements, {history['announced']:,}; ",
        "addresses upwards, holes drawn short, heights by the logarithm of the size</p>",
        memory_map("address space over time", layouts, recorded * 1000, "ms"),
    ]
    return f'<section id="{escape(found["recording"])}">{"".join(parts)}</section>\n'


def _table(drivers: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(row['driver'])} ({row['kind']})</th>" for row in drivers)
    callbacks = sorted({name for row in drivers for name in row["callbacks"]})
    body = "".join(
        _row(name, [f"{row['callbacks'].get(name, 0):,}" for row in drivers]) for name in callbacks
    )
    body += "".join(
        _row(label, ["-" if row[key] is None else f"{row[key]:,}" for row in drivers])
        for key, label in _ROWS
    )
    body += _row("time in callbacks", [f"{row['callback_seconds']:.3f} s" for row in drivers])
    return (
        f'<div class="table"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(label: str, cells: list[str]) -> str:
    return f"<tr><th>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _size(power: int) -> str:
    """The class of sizes up to 2**power pages and above half of that."""
    if power < 2:
        return str(1 << power)
    if power > 20:
        return f"≤2^{power}"
    return f"≤{1 << power:,}"


def _latency(bits: int) -> str:
    """The class of times below 2**bits ns and not below half of that."""
    for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)):
        if (1 << bits) < 1000 * size or unit == "s":
            most = (1 << bits) / size
            return f"{most:.0f} {unit}" if most >= 10 else f"{most:.2g} {unit}"
    raise AssertionError(bits)
