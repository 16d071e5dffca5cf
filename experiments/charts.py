"""Charts on a ``Canvas``: axes with ticks, a legend above the data, points, lines and bars with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from experiments.canvas import DARK, FAINT, GREY, WHITE, Box, Canvas, Dot, Stroke, Text, text_width
from experiments.intervals import Interval

# Okabe & Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PLAIN = ("#333333", "#595959", "#7A7A7A", "#9A9A9A", "#BDBDBD")  # rows without a model
WIDTH, PLOT_HEIGHT = 800, 340
LEFT, RIGHT, BELOW = 70, 36, 66  # margins of a plot
TITLE, LEGEND_ROW = 34, 20
Mark = tuple[float, Interval]  # x, and y with its interval


@dataclass(frozen=True)
class Series:
    """What one method has in a chart: a mark at each x, or at each place (None where there is none)."""

    name: str
    marks: Sequence[Mark | None]
    colour: str
    sizes: Sequence[float] = ()  # radii of dots


@dataclass(frozen=True)
class Axis:
    """A range in the data's units, its ticks, and where it lies on the sheet (pixels, low to high)."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    span: tuple[float, float] = field(default=(0.0, 1.0))

    def at(self, value: float) -> float:
        """Where a value lies on the sheet."""
        low, high, v = (math.log10(t) if self.log else t for t in (self.low, self.high, value))
        share = (v - low) / (high - low) if high > low else 0.5
        return self.span[0] + (self.span[1] - self.span[0]) * share

    def told(self, tick: float) -> str:
        """A tick in words."""
        if self.log:
            return f"{tick:,.0f}" if tick >= 1 else f"{tick:g}"
        steps = [b - a for a, b in pairwise(self.ticks)]
        digits = max(0, -math.floor(math.log10(steps[0]) + 1e-9)) if steps else 0
        return f"{tick:,.{digits}f}"


def axis_step(length: float) -> float:
    """Distance of the ticks of an axis: 1, 2 or 5 times a power of ten, at most six of them."""
    least = max(length, 1e-9) / 6
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))


def linear(title: str, values: Sequence[float], zero: bool = True, whole: bool = False) -> Axis:
    """An axis over values that ends on ticks.

    Args:
        title: with the unit.
        values: what must fit.
        zero: whether it begins at 0 (or below, where values do).
        whole: whether its ticks are whole numbers.
    """
    low, high = min([*values, 0.0] if zero else values), max(values)
    step = max(axis_step(max(high - low, 1e-9)), float(whole))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [n * step for n in range(first, max(last, first + 1) + 1)]
    return Axis(title, ticks[0], ticks[-1], ticks)


def logarithmic(title: str, values: Sequence[float]) -> Axis:
    """An axis over positive values from a power of ten to another."""
    first = math.floor(math.log10(min(values)) - 1e-9)
    last = max(math.ceil(math.log10(max(values)) + 1e-9), first + 1)
    every = max(1, math.ceil((last - first) / 8))
    ticks = [10.0**n for n in range(first, last + 1, every)]
    return Axis(title, 10.0**first, 10.0**last, ticks, log=True)


def legend_height(names: Sequence[str]) -> float:
    """The room that a legend of these names takes."""
    return LEGEND_ROW * len(_rows(names))


def _rows(names: Sequence[str]) -> list[list[tuple[int, float]]]:
    """Which name stands in which row of a legend, and at which x."""
    rows: list[list[tuple[int, float]]] = [[]]
    x = float(LEFT)
    for number, name in enumerate(names):
        width = text_width(name, 12) + 42
        if rows[-1] and x + width > WIDTH - RIGHT + 28:
            rows.append([])
            x = float(LEFT)
        rows[-1].append((number, x))
        x += width
    return rows


def legend(canvas: Canvas, series: Sequence[Series], top: float) -> None:
    """Colour and name of each series, in as many rows as they need."""
    for row, entries in enumerate(_rows([s.name for s in series])):
        y = top + LEGEND_ROW * row
        for number, x in entries:
            canvas.add(Box(x, y + 1, 12, 12, series[number].colour))
            canvas.add(Text(x + 18, y + 11, series[number].name, anchor="start"))


def frame(canvas: Canvas, x: Axis, y: Axis) -> None:
    """Grid lines, ticks and titles of two axes."""
    (left, right), (bottom, top) = x.span, y.span
    for tick in y.ticks:
        canvas.line((left, y.at(tick)), (right, y.at(tick)), FAINT)
        canvas.add(Text(left - 8, y.at(tick) + 4, y.told(tick), anchor="end"))
    for tick in x.ticks:
        canvas.line((x.at(tick), bottom), (x.at(tick), bottom + 5), DARK)
        canvas.add(Text(x.at(tick), bottom + 19, x.told(tick)))
    canvas.line((left, bottom), (right, bottom))
    canvas.line((left, bottom), (left, top))
    canvas.add(Text(sum(x.span) / 2, bottom + (44 if x.ticks else 56), x.title, size=13))
    canvas.add(Text(left - 52, sum(y.span) / 2, y.title, size=13, turned=True))


def named_places(
    canvas: Canvas, title: str, places: Sequence[tuple[str, str]], y: Axis
) -> list[float]:
    """The axes of a chart whose x axis has places, not numbers; the middle of each.

    Args:
        canvas: with room below the y axis.
        title: of the x axis.
        places: name, and a note below it.
        y: a placed axis.
    """
    frame(canvas, Axis(title, 0, 1, [], span=(LEFT, WIDTH - RIGHT)), y)
    width = (WIDTH - LEFT - RIGHT) / len(places)
    middles = [LEFT + width * (n + 0.5) for n in range(len(places))]
    for middle, (name, note) in zip(middles, places, strict=True):
        canvas.add(Text(middle, y.span[0] + 19, name))
        canvas.add(Text(middle, y.span[0] + 35, note, colour=GREY))
    return middles


def sheet(
    title: str, series: Sequence[Series], plots: int = 1
) -> tuple[Canvas, list[tuple[float, float]]]:
    """A sheet with its title and legend, and the (bottom, top) of each plot on it."""
    top = TITLE + legend_height([s.name for s in series]) + 14
    each = PLOT_HEIGHT if plots == 1 else PLOT_HEIGHT * 0.7
    canvas = Canvas(WIDTH, round(top + plots * (each + BELOW)))
    canvas.add(Text(WIDTH / 2, 22, title, size=15))
    legend(canvas, series, TITLE)
    spans = [(top + n * (each + BELOW) + each, top + n * (each + BELOW)) for n in range(plots)]
    return canvas, spans


def placed(axis: Axis, span: tuple[float, float]) -> Axis:
    """An axis at its place on the sheet."""
    return Axis(axis.title, axis.low, axis.high, axis.ticks, axis.log, span)


def scatter(
    canvas: Canvas, series: Sequence[Series], x: Axis, y: Axis, joined: bool = False
) -> None:
    """Marks with their intervals, joined by lines or not.

    Args:
        canvas: with room between the axes' spans.
        series: marks in the order of their lines.
        x, y: placed axes.
        joined: whether a series is a line.
    """
    frame(canvas, x, y)
    for number, one in enumerate(series):
        marks = [m for m in one.marks if m is not None]
        # Marks that later ones would hide look out from behind them.
        hidden = sum(other.marks == one.marks for other in series[number + 1 :])
        if joined and len(marks) > 1:
            points = [(x.at(m[0]), y.at(m[1].value)) for m in marks]
            canvas.add(Stroke(points, one.colour, 1.8 + 3 * hidden))
        for nth, (place, told) in enumerate(marks):
            at = x.at(place)
            if told.high > told.low:
                canvas.line((at, y.at(told.low)), (at, y.at(told.high)), one.colour, 1.4)
            radius = one.sizes[nth] if one.sizes else 3.0 if joined else 5.5
            canvas.add(Dot(at, y.at(told.value), radius + 2.5 * hidden, one.colour))


def bars(
    canvas: Canvas, series: Sequence[Series], places: Sequence[tuple[str, str]], y: Axis
) -> None:
    """Groups of bars, one a series, with intervals as lines.

    Args:
        canvas: with room between the margins.
        series: a mark for each place; its x is not looked at.
        places: of the groups: name, and a note below it.
        y: a placed axis.
    """
    thick = (WIDTH - LEFT - RIGHT) / len(places) * 0.84 / len(series)
    base = y.at(max(0.0, y.low))
    for place, middle in enumerate(named_places(canvas, "", places, y)):
        for number, one in enumerate(series):
            mark = one.marks[place]
            if mark is None:
                continue
            left = middle + (number - len(series) / 2) * thick
            high, told = y.at(mark[1].value), mark[1]
            # A zero is seen, too: what has no bar at all was not measured.
            top, tall = (
                (min(high, base), abs(base - high)) if abs(base - high) > 2 else (base - 2, 2)
            )
            canvas.add(Box(left, top, thick - 1, tall, one.colour))
            centre = left + (thick - 1) / 2
            if told.high > told.low:
                low, top = y.at(max(told.low, y.low)), y.at(min(told.high, y.high))
                canvas.line((centre, low), (centre, top), WHITE, 3.2)  # seen on dark bars as well
                canvas.line((centre, low), (centre, top), DARK, 1.2)
