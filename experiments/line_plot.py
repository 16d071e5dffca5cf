"""A plot of points with intervals over named places, as SVG: text alone, so that no library is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from experiments.intervals import Interval

WIDTH, HEIGHT = 800, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 70, 74  # margins
# Okabe & Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DODGE = 9  # pixels between the points of two lines at one place


@dataclass(frozen=True)
class Line:
    """One line of a plot: a point at each place, None where there is none."""

    name: str
    points: Sequence[Interval | None]


def line_plot(
    title: str, x_title: str, y_title: str, places: Sequence[tuple[str, str]], lines: Sequence[Line]
) -> str:
    """The text of an SVG file.

    Args:
        title, x_title, y_title: what stands above and beside the axes.
        places: of the x axis: name, and a note below it.
        lines: of values in [0, 1] or so; the y axis begins at 0.
    """
    highest = max((p.high for line in lines for p in line.points if p), default=1.0)
    step = axis_step(highest)
    top = step * math.ceil(highest / step - 1e-9)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 22, title, size=15),
        *_axes(places, step, top),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_title, size=13),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, y_title, size=13)}</g>',
        *(part for n, line in enumerate(lines) for part in _drawn(n, line, lines, top)),
        "</svg>",
    ]) + "\n"  # fmt: skip


def axis_step(length: float) -> float:
    """Distance of the ticks of an axis: 1, 2 or 5 times a power of ten, at most six of them."""
    least = max(length, 1e-9) / 6
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))


def _x(place: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (place + 0.5) / count


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top


def _axes(places: Sequence[tuple[str, str]], step: float, top: float) -> Iterator[str]:
    digits = max(0, -math.floor(math.log10(step)))
    for tick in range(round(top / step) + 1):
        y = _y(tick * step, top)
        yield _stroke(LEFT, y, WIDTH - RIGHT, y, "#DDDDDD" if tick else "#000000", 1)
        yield _text(LEFT - 8, y + 4, f"{tick * step:.{digits}f}", anchor="end")
    for place, (name, note) in enumerate(places):
        x = _x(place, len(places))
        yield _text(x, HEIGHT - BOTTOM + 18, name)
        yield _text(x, HEIGHT - BOTTOM + 34, note, colour="#666666")


def _drawn(number: int, line: Line, lines: Sequence[Line], top: float) -> Iterator[str]:
    """A line with its intervals, and its entry in the legend."""
    colour = COLOURS[number % len(COLOURS)]
    shift = (number - (len(lines) - 1) / 2) * _DODGE
    at = [
        (_x(place, len(line.points)) + shift, point)
        for place, point in enumerate(line.points)
        if point is not None
    ]
    path = " ".join(f"{x:.1f},{_y(p.value, top):.1f}" for x, p in at)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    for x, point in at:
        yield _stroke(x, _y(point.low, top), x, _y(point.high, top), colour, 1.5)
        yield f'<circle cx="{x:.1f}" cy="{_y(point.value, top):.1f}" r="4" fill="{colour}"/>'
    begin = LEFT + (WIDTH - LEFT - RIGHT) * number / len(lines)
    yield f'<rect x="{begin:.1f}" y="40" width="12" height="12" fill="{colour}"/>'
    yield _text(begin + 18, 50, line.name, anchor="start")


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _text(
    x: float, y: float, text: str, anchor: str = "middle", size: int = 12, colour: str = "#000000"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{escape(text)}</text>"
    )
