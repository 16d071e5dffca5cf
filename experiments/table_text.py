"""Tables as text: Markdown, LaTeX (booktabs) and CSV, from cells that know their number and its interval."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.intervals import Interval

FORMATS = ("markdown", "latex", "csv")
LEVEL = 0.05  # of p, corrected for the number of tests in the table
BETTER, WORSE = "⁺", "⁻"
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "≥": r"$\geq$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    BETTER: "$^{+}$", WORSE: "$^{-}$",
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for the beginning of one


def spread(interval: Interval | None, digits: int) -> str:
    """`` ±0.0044``, or `` [0.0000, 0.0037]`` of an uneven one; with more digits where those say 0."""
    if interval is None:
        return ""
    size = interval.half or interval.high - interval.low
    digits = max(digits, math.ceil(-math.log10(size))) if size > 0 else digits
    if interval.half is not None:
        return f" ±{interval.half:.{digits}f}"
    return f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


@dataclass(frozen=True)
class Value:
    """A number in a table, or None where nothing was measured.

    Args:
        value: the number.
        interval: of 95 %.
        digits: behind the point; -1 for three significant ones.
        p: of no difference to the baseline, corrected for all tests of the table.
        gain: the difference to the baseline, which gives the mark its sign.
        note: stands behind it in brackets.
    """

    value: float | None
    interval: Interval | None = None
    digits: int = 4
    p: float | None = None
    gain: float = 0.0
    note: str = ""

    @property
    def mark(self) -> str:
        """Whether it differs from the baseline beyond chance."""
        if self.p is None or self.p >= LEVEL or not self.gain:
            return ""
        return BETTER if self.gain > 0 else WORSE

    def __str__(self) -> str:
        """``0.1089 ±0.0044⁺``; a dash without a number."""
        if self.value is None:
            return "-"
        note = f" ({self.note})" if self.note else ""
        return f"{self._told(self.value)}{spread(self.interval, self.digits)}{self.mark}{note}"

    def _told(self, number: float) -> str:
        if self.digits < 0:
            return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
        return f"{number:.{self.digits}f}"


@dataclass(frozen=True)
class Line:
    """A row of a table: what it is called, and its cells by column; a column that it lacks is a dash."""

    label: str
    cells: Mapping[str, Value | str]
    reference: bool = False  # below a line of its own


@dataclass(frozen=True)
class Sheet:
    """A table: its title, the columns in order, its rows, and remarks below."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Line]
    remarks: Sequence[str] = ()
    corner: str = "method"  # what the first column holds

    def told(self, form: str) -> str:
        """The whole table in one of ``FORMATS``; CSV has no title and no remarks."""
        return {"markdown": self._markdown, "latex": self._latex, "csv": self._csv}[form]()

    def _cells(self) -> list[list[str]]:
        return [
            [line.label, *(str(line.cells.get(c, "-")) for c in self.columns)]
            for line in self.lines
        ]

    def _markdown(self) -> str:
        grid = [[self.corner, *self.columns], *self._cells()]
        grid = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in grid]
        width = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
        rows = [
            "| " + " | ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) + " |"
            for row in grid
        ]
        rule = "|" + "|".join(["-" * (width[0] + 2), *("-" * (w + 1) + ":" for w in width[1:])])
        body = [f"**{self.title}**", "", rows[0], f"{rule}|", *rows[1:]]
        return "\n".join([*body, *(f"\n{r}" for r in self.remarks)]) + "\n"

    def _latex(self) -> str:
        return "\n".join(self._latex_lines()) + "\n"

    def _latex_lines(self) -> Iterator[str]:
        yield from (f"% {remark}" for remark in self.remarks)
        yield r"% needs \usepackage{booktabs}"
        yield r"\begin{table}"
        yield r"  \centering"
        yield rf"  \caption{{{latex(self.title)}}}"
        yield rf"  \begin{{tabular}}{{l{'r' * len(self.columns)}}}"
        yield r"    \toprule"
        yield "    " + " & ".join(map(latex, [self.corner, *self.columns])) + r" \\"
        yield r"    \midrule"
        for number, (line, cells) in enumerate(zip(self.lines, self._cells(), strict=True)):
            if number and line.reference and not self.lines[number - 1].reference:
                yield r"    \midrule"
            yield "    " + " & ".join(map(latex, cells)) + r" \\"
        yield r"    \bottomrule"
        yield r"  \end{tabular}"
        yield r"\end{table}"

    def _csv(self) -> str:
        """A column for each number; where any row has one, also for its interval, p and note."""
        out = io.StringIO()
        write = csv.writer(out, lineterminator="\n")
        parts = [(c, part) for c in self.columns for part in self._parts(c)]
        write.writerow([self.corner, *(f"{c} {part}".strip() for c, part in parts)])
        for line in self.lines:
            cells = [_part(line.cells.get(c, ""), part) for c, part in parts]
            write.writerow([_harmless(line.label), *cells])
        return out.getvalue()

    def _parts(self, column: str) -> list[str]:
        cells = [line.cells.get(column) for line in self.lines]
        found = [c for c in cells if isinstance(c, Value)]
        spans = [c.interval for c in found if c.interval]
        uneven = any(s.half is None for s in spans)
        told = {
            "±": any(s.half is not None for s in spans),
            "low": uneven,
            "high": uneven,
            "p": any(c.p is not None for c in found),
            "note": any(c.note for c in found),
        }
        return ["", *(part for part, any_has in told.items() if any_has)]


def _part(cell: Value | str, part: str) -> str:
    if not isinstance(cell, Value):
        return "" if part else _harmless(cell)
    if part == "note":
        return _harmless(cell.note)
    span = cell.interval
    ends = {"±": span.half, "low": span.low, "high": span.high} if span else {}
    number = {"": cell.value, "p": cell.p, **ends}.get(part)
    return "" if number is None else f"{number:.6g}"


def _harmless(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    formula = text.startswith(_FORMULA) and text != "-" and not _NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def latex(text: str) -> str:
    """Text with everything escaped that LaTeX would take for something else."""
    return "".join(_LATEX.get(c, c) for c in text)
