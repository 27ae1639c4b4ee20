"""Plots as SVG text: static, so that a page shows them without a script and without a network.

Every mark carries its number in `data-count` (an area of memory its bytes in `data-start` and
`data-end`) and as a tooltip, so that a plot can be held against the table beside it.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Layout: TypeAlias = Sequence[tuple[int, int, str]]
    """(start, end, kind) of mappings, ascending."""

_WIDTH: Final = 960
_LEFT: Final = 88
_RIGHT: Final = 12
_TOP: Final = 14
_BOTTOM: Final = 40
_LINE: Final = 14
_GAP_SHARE: Final = 0.25
"""How much of the height of an address-space map holes may take."""


def columns(
    name: str,
    series: Mapping[str, Mapping[int, int]],
    width: float,
    end: float,
    unit: str,
    height: int = 240,
) -> str:
    """Stacked columns: of each series, counts by column; a column stands for `width` units.

    The axis goes from 0 to `end`, or as far as there is anything.
    """
    last = max((index for counts in series.values() for index in counts), default=0)
    last = max(last, math.ceil(end / width) - 1)
    totals = [sum(counts.get(index, 0) for counts in series.values()) for index in range(last + 1)]
    top, steps = _scale(max(totals, default=0))
    plot = _height(height)
    step = (_WIDTH - _LEFT - _RIGHT) / (last + 1)
    marks = _grid(((value / top, f"{value:,}") for value in steps), height)
    for index in range(last + 1):
        below = 0
        for number, (label, counts) in enumerate(series.items()):
            count = counts.get(index, 0)
            if count:
                y = _TOP + plot * (1 - (below + count) / top)
                tip = f"{label}: {count:,} at {index * width:,.4g} {unit}"
                marks += _bar(
                    _LEFT + index * step, y, max(step - 0.6, 0.6), plot * count / top, number,
                    count, tip,
                )  # fmt: skip
                below += count
    for value in _scale((last + 1) * width)[1]:
        x = _LEFT + value / width * step
        if x <= _WIDTH - _RIGHT:
            marks += _text(x, height - _BOTTOM + 16, f"{value:,.4g}", "middle")
    marks += _text((_LEFT + _WIDTH) / 2, height - 6, unit, "middle")
    return _legend(series) + _svg(name, marks, height)


def histogram(
    name: str,
    counts: Mapping[int, int],
    label: Callable[[int], str],
    unit: str,
    height: int = 220,
    classes: range | None = None,
) -> str:
    """Bars on a logarithmic scale: counts by class; all that are used, or those asked for."""
    if not counts:
        return _svg(name, _text(_WIDTH / 2, height / 2, "none", "middle"), height)
    if classes is None:
        classes = range(min(counts), max(counts) + 1)
    first, last = classes[0], classes[-1]
    decades = max(1, math.ceil(math.log10(max(counts.values()) + 1)))
    plot = _height(height)
    step = min(90.0, (_WIDTH - _LEFT - _RIGHT) / (last - first + 1))
    marks = _grid(((power / decades, f"{10**power:,}") for power in range(decades + 1)), height)
    for index in range(first, last + 1):
        x = _LEFT + (index - first) * step
        marks += _text(x + step / 2, height - _BOTTOM + 16, label(index), "middle")
        count = counts.get(index, 0)
        if count:
            # A single one is seen, too: the axis begins a little below 1.
            tall = plot * (math.log10(count) + 0.12) / (decades + 0.12)
            tip = f"{label(index)} {unit}: {count:,}"
            y = _TOP + plot - tall
            marks += _bar(x + step * 0.1, y, step * 0.8, tall, 0, count, tip)
            marks += _text(x + step / 2, max(y - 3, 9), f"{count:,}", "middle")
    marks += _text((_LEFT + _WIDTH) / 2, height - 6, unit, "middle")
    return _svg(name, marks, height)


def memory_map(
    name: str, layouts: Sequence[tuple[float, Layout]], end: float, unit: str, height: int = 420
) -> str:
    """Mappings over time: time to the right, addresses upwards with the holes drawn short.

    A mapping's height grows with the logarithm of its size; `layouts` are (time, mappings), each
    good until the next.
    """
    kinds = list(dict.fromkeys(kind for _, layout in layouts for _, _, kind in layout))
    place = _places([layout for _, layout in layouts], height)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(end, 1e-9)
    marks = _addresses([layout for _, layout in layouts], place)
    open_since: dict[tuple[int, int, str], float] = {}
    for index, (when, layout) in enumerate([*layouts, (end, ())]):
        here = set(layout)
        for area in [area for area in open_since if area not in here]:
            since = open_since.pop(area)
            start, stop, kind = area
            low, high = place[start], place[stop]
            marks += (
                f'<rect class="s{kinds.index(kind) % 6}" data-start="{start}" data-end="{stop}" '
                f'x="{_LEFT + since * scale:.1f}" y="{high:.1f}" '
                f'width="{max((when - since) * scale, 0.5):.1f}" '
                f'height="{max(low - high - 0.3, 0.5):.1f}"><title>'
                f"{start:x}-{stop:x} {escape(kind)}, {(stop - start) >> 10:,} KiB"
                "</title></rect>"
            )
        if index < len(layouts):
            for area in layout:
                open_since.setdefault(area, when)
    for value in _scale(end)[1]:
        x = _LEFT + value * scale
        if x <= _WIDTH - _RIGHT:
            marks += _text(x, height - _BOTTOM + 16, f"{value:,.4g}", "middle")
    marks += _text((_LEFT + _WIDTH) / 2, height - 6, unit, "middle")
    return _legend(kinds) + _svg(name, marks, height)


def _places(layouts: Iterable[Layout], height: int) -> dict[int, float]:
    """Where each boundary of a mapping is drawn, from the bottom up."""
    areas = {(start, stop) for layout in layouts for start, stop, _ in layout}
    bounds = sorted({bound for area in areas for bound in area})
    covered = _covered(bounds, areas)
    heights = [
        math.log2(2 + ((high - low) >> 12)) if used else 0.0
        for low, high, used in zip(bounds, bounds[1:], covered, strict=False)
    ]
    used = sum(heights)
    holes = covered.count(False)
    plot = _height(height)
    hole = min(6.0, plot * _GAP_SHARE / max(holes, 1))
    scale = (plot - hole * holes) / max(used, 1e-9)
    at = float(_TOP + plot)
    places = {bounds[0]: at} if bounds else {}
    for bound, tall, inside in zip(bounds[1:], heights, covered, strict=True):
        at -= tall * scale if inside else hole
        places[bound] = at
    return places


def _addresses(layouts: Iterable[Layout], place: Mapping[int, float]) -> str:
    """Where mappings begin, in figures, as far as there is room for them."""
    marks = ""
    below = math.inf
    for start in sorted({start for layout in layouts for start, _, _ in layout}):
        if place[start] <= below - _LINE:
            below = place[start]
            marks += _text(_LEFT - 6, below, f"{start:x}", "end")
    return marks


def _covered(bounds: Sequence[int], areas: Iterable[tuple[int, int]]) -> list[bool]:
    """Whether anything was ever mapped between each bound and the next."""
    change = dict.fromkeys(bounds, 0)
    for start, stop in areas:
        change[start] += 1
        change[stop] -= 1
    found = []
    depth = 0
    for bound in bounds[:-1]:
        depth += change[bound]
        found.append(depth > 0)
    return found


def _scale(top: float) -> tuple[float, list[int]]:
    """The end of an axis from zero that has room for `top`, and where its labels are."""
    if top <= 4:
        return max(top, 1), list(range(math.ceil(top) + 1))
    step = 10 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 6)
    end = math.ceil(top / step) * step
    return end, [int(value * step) for value in range(round(end / step) + 1)]


def _height(height: int) -> int:
    return height - _TOP - _BOTTOM


def _grid(lines: Iterable[tuple[float, str]], height: int) -> str:
    plot = _height(height)
    marks = ""
    for share, label in lines:
        y = _TOP + plot * (1 - share)
        marks += f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        marks += _text(_LEFT - 6, y + 4, label, "end")
    return marks


def _bar(
    x: float, y: float, width: float, height: float, number: int, count: int, tip: str
) -> str:  # fmt: skip
    return (
        f'<rect class="s{number % 6}" data-count="{count}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}"><title>{escape(tip)}</title></rect>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Iterable[str]) -> str:
    entries = "".join(
        f'<li><i class="s{number % 6}"></i>{escape(name)}</li>' for number, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def _svg(name: str, marks: str, height: int) -> str:
    return (
        f'<div class="plot"><svg role="img" aria-label="{escape(name)}" '
        f'viewBox="0 0 {_WIDTH} {height}">{marks}</svg></div>'
    )
