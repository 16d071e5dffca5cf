"""A sweep as one sheet: each trial's value with the best so far, and the value against each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments import charts
from experiments.canvas import DARK, GREY, WHITE, Canvas, Dot, Stroke, Text, text_width
from experiments.charts import BELOW, COLOURS, LEFT, RIGHT, TITLE, WIDTH, Axis, Series
from experiments.sweep_space import TEST, Choices, Range, Space
from experiments.sweep_study import Tried

TRIALS_HEIGHT, PANEL_HEIGHT = 230, 170
GAP = 82  # between two panels, with room for the right one's numbers
ROOM = 0.04  # of an axis, beyond its first and last value
BLUE, ORANGE = COLOURS[0], COLOURS[1]
_MANTISSAS = (1, 2, 5)


@dataclass(frozen=True)
class Named(Axis):
    """An axis with a place for each of some names: 0.5, 1.5, ..."""

    names: tuple[str, ...] = ()

    def told(self, tick: float) -> str:
        """The name at a place, cut where its neighbours begin."""
        name = self.names[int(tick)]
        room = (self.span[1] - self.span[0]) / len(self.names) - 6
        while len(name) > 2 and text_width(name, 12) > room:
            name = name.rstrip("…")[:-1] + "…"
        return name


def drawn(title: str, space: Space, metric: str, tried: Sequence[Tried]) -> Canvas:
    """The sheet.

    Args:
        title: the experiment's name.
        space: what was tried.
        metric: what was measured.
        tried: trials by place; those without a value are left out.
    """
    shown = [t for t in tried if t.value is not None]
    first = _best(shown, space)
    legend = [Series("trial", [], BLUE)]
    legend += [Series("best so far, best trial", [], ORANGE)] if first else []
    pruned = any(t.state == "pruned" for t in shown)
    legend += [Series("pruned, at its last epoch", [], GREY)] if pruned else []
    rows = math.ceil(len(space.axes) / 2)
    top = TITLE + charts.legend_height([s.name for s in legend]) + 14
    canvas = Canvas(WIDTH, round(top + TRIALS_HEIGHT + BELOW + rows * (PANEL_HEIGHT + BELOW)))
    canvas.add(Text(WIDTH / 2, 22, f"{title}: {metric} of {len(shown)} trials", size=15))
    charts.legend(canvas, legend, TITLE)
    values = [t.value for t in shown if t.value is not None]
    y = charts.linear(metric, values, zero=False)
    upper = replace(y, span=(top + TRIALS_HEIGHT, top))
    _trials(canvas, shown, space, first, upper)
    for number, axis in enumerate(space.axes):
        row_top = top + TRIALS_HEIGHT + BELOW + (number // 2) * (PANEL_HEIGHT + BELOW)
        _panel(
            canvas,
            axis,
            space,
            shown,
            first,
            number % 2,
            replace(y, span=(row_top + PANEL_HEIGHT, row_top)),
        )
    return canvas


def _best(shown: Sequence[Tried], space: Space) -> Tried | None:
    done = [t for t in shown if t.state == "done"]
    if space.on == TEST:
        return None
    return max(done, key=lambda t: (space.better * (t.value or 0.0), -t.place), default=None)


def _trials(
    canvas: Canvas, shown: Sequence[Tried], space: Space, first: Tried | None, y: Axis
) -> None:
    """Values in the order of the trials, and the best so far as steps."""
    last = max(t.place for t in shown)
    step = max(1, round(charts.axis_step(last + 1)))
    ticks = [float(n) for n in range(0, last + 1, step)]
    x = Axis("trial", -0.5, last + 0.5, ticks, span=(LEFT, WIDTH - RIGHT))
    charts.frame(canvas, x, y)
    if first:
        steps: list[tuple[float, float]] = []
        for t in (t for t in shown if t.state == "done" and t.value is not None):
            value = t.value or 0.0
            if not steps or space.better * (value - steps[-1][1]) > 0:
                steps += [(t.place, steps[-1][1])] if steps else []
                steps.append((t.place, value))
        steps.append((last + 0.5, steps[-1][1]))
        canvas.add(Stroke([(x.at(a), y.at(b)) for a, b in steps], ORANGE, 1.8))
    for t in shown:
        _dot(canvas, t, first, x.at(t.place), y.at(t.value or 0.0))


def _panel(
    canvas: Canvas, axis: Choices | Range, space: Space, shown: Sequence[Tried],
    first: Tried | None, column: int, y: Axis,
) -> None:  # fmt: skip
    """Values against one parameter."""
    width = (WIDTH - LEFT - RIGHT - GAP) / 2
    left = LEFT + column * (width + GAP)
    x = replace(_axis(axis, space.labels()[axis.key]), span=(left, left + width))
    charts.frame(canvas, x, y)
    beside: dict[float, int] = {}
    for t in sorted(shown, key=lambda t: t is first):  # the best one on top
        given = t.point.get(axis.key)
        if given is None:
            continue
        place = float(given) if isinstance(axis, Range) else axis.texts.index(given) + 0.5
        shift = 0.0
        if isinstance(axis, Choices):  # trials of one choice stand side by side
            nth = beside[place] = beside.get(place, -1) + 1
            shift = min(7.0, width / len(axis.texts) / 14) * math.ceil(nth / 2) * (-1) ** nth
            shift = math.fmod(shift, width / len(axis.texts) / 2.4)
        _dot(canvas, t, first, x.at(place) + shift, y.at(t.value or 0.0))


def _dot(canvas: Canvas, trial: Tried, first: Tried | None, x: float, y: float) -> None:
    if trial.state == "pruned":
        canvas.add(Dot(x, y, 3.6, GREY), Dot(x, y, 2.2, WHITE))
    elif trial is first:
        canvas.add(Dot(x, y, 6.5, DARK), Dot(x, y, 5.5, ORANGE))
    else:
        canvas.add(Dot(x, y, 4.2, WHITE), Dot(x, y, 3.7, BLUE))


def _axis(axis: Choices | Range, label: str) -> Axis:
    """An axis over all that a parameter could be, so that what was not tried is seen."""
    if isinstance(axis, Choices):
        places = [n + 0.5 for n in range(len(axis.texts))]
        return Named(
            label, 0.0, len(axis.texts), places, names=tuple(t.strip("'") for t in axis.texts)
        )
    low, high = float(axis.low), float(axis.high)
    if axis.log:
        more = (high / low) ** ROOM
        return Axis(
            f"{label} (logarithmic)", low / more, high * more, _log_ticks(low, high), log=True
        )
    more = (high - low) * ROOM
    step = max(charts.axis_step(high - low), float(axis.whole))
    if axis.step is not None:
        steps = axis.grid()
        ticks = [float(t) for t in steps[:: math.ceil(len(steps) / 7)]]
        return Axis(label, low - more, high + more, ticks)
    ticks = [
        n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]
    return Axis(label, low - more, high + more, ticks)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten over less than two decades, else powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    of = _MANTISSAS if high / low < 100 else (1,)
    ticks = [m * 10.0**p for p in powers for m in of]
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
