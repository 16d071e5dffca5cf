"""A plot of points with intervals over named places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments import charts
from experiments.canvas import Canvas, Dot, Stroke
from experiments.charts import COLOURS, Series
from experiments.intervals import Interval

_DODGE = 9  # pixels between the points of two lines at one place


@dataclass(frozen=True)
class Line:
    """One line of a plot: a point at each place, None where there is none."""

    name: str
    points: Sequence[Interval | None]


def line_plot(
    title: str, x_title: str, y_title: str, places: Sequence[tuple[str, str]], lines: Sequence[Line]
) -> Canvas:
    """The plot on its sheet.

    Args:
        title, x_title, y_title: what stands above and beside the axes.
        places: of the x axis: name, and a note below it.
        lines: of values in [0, 1] or so; the y axis begins at 0.
    """
    legend = [Series(line.name, [], COLOURS[n % len(COLOURS)]) for n, line in enumerate(lines)]
    canvas, (span,) = charts.sheet(title, legend)
    highs = [p.high for line in lines for p in line.points if p]
    y = charts.placed(charts.linear(y_title, highs or [1.0]), span)
    middles = charts.named_places(canvas, x_title, places, y)
    for number, (line, entry) in enumerate(zip(lines, legend, strict=True)):
        shift = (number - (len(lines) - 1) / 2) * _DODGE
        at = [(x + shift, p) for x, p in zip(middles, line.points, strict=True) if p is not None]
        if len(at) > 1:
            canvas.add(Stroke([(x, y.at(p.value)) for x, p in at], entry.colour, 1.5))
        for x, p in at:
            canvas.line((x, y.at(p.low)), (x, y.at(p.high)), entry.colour, 1.5)
            canvas.add(Dot(x, y.at(p.value), 4, entry.colour))
    return canvas
