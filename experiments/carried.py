"""Rows of a published file that no run folder here has: what others measured stays until it is run anew.

A table of a Markdown text is known by the heading above it, a row by some of its cells. What was carried over
is marked: nothing here can tell whether its code has changed since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from experiments import config

MARK, CHANGED = "‡", "*"
TOLD = f"{MARK} marks rows of runs that were not at hand when this was written"
_HEADINGS = ("#", "Table ")
_RULE, _PROTOCOL = "|---", "* fingerprint "
_NONE = ("-", "no experiment")

Key = tuple[str, ...]


@dataclass(frozen=True)
class _Line:
    text: str
    heading: str  # of its table
    head: Key  # its table's columns; empty where this line is not of a table's body
    cells: Key

    def at(self, column: str) -> str:
        """The cell of a column."""
        return self.cells[self.head.index(column)]

    def of(self, columns: Sequence[str]) -> Key:
        """Its table, and the cells that name the row, without marks."""
        return self.heading, *(_plain(self.at(column)) for column in columns)

    def marked(self, column: str) -> str:
        """The line, its cell of this column with the mark."""
        place = self.head.index(column)
        cells = list(self.cells)
        cells[place] = f"{_plain(cells[place])} {MARK}"
        return f"| {' | '.join(cells)} |"


def with_numbers(new: Sequence[str], old: Sequence[str], number: str) -> list[str]:
    """A section anew; rows without a number have the one that they had.

    Args:
        new, old: its lines; both have ``* fingerprint X: ...`` lines, which tell of the rows' protocols.
        number: a column of numbers, where a dash says that nothing was run; those before it name a row.
    """

    def named(line: _Line) -> Key:
        return line.of(line.head[: line.head.index(number)])

    rows = [line for line in _lines(old) if number in line.head]
    before = {named(line): line for line in rows if line.at(number) not in _NONE}
    told: list[str] = []
    kept: list[_Line] = []
    for line in _lines(new):
        known = before.get(named(line)) if number in line.head and line.at(number) == "-" else None
        kept += [known] if known else []
        told.append(known.marked(number) if known else line.text)
    if not kept:
        return told
    prints = {line.at("fingerprint") for line in kept}
    notes = [text for text in old if text.startswith(_PROTOCOL) and text not in told]
    needed = [text for text in notes if text.removeprefix(_PROTOCOL).partition(":")[0] in prints]
    return [*told, *needed, "", f"{TOLD}: {len(kept)} rows."]


def with_rows(
    new: Sequence[str], old: Sequence[str], number: str, names: Sequence[str]
) -> list[str]:
    """Tables anew, with the rows and the tables of the old text that the new one has not.

    Args:
        new, old: their lines. A table whose columns have changed is taken as it is now.
        number: the column that carries the mark.
        names: the columns that name a row; the first begins with the name of an experiment, or of a method
            that is none. Rows of experiments that are gone are left out.
    """
    lines = list(_lines(new))
    known = {line.of(names) for line in lines if line.head}
    heads = {line.heading: line.head for line in lines if line.head}
    experiments = set(config.names())
    wanted = [
        line
        for line in _lines(old)
        if line.head
        and line.of(names) not in known
        and heads.get(line.heading, line.head) == line.head
        and ("/" not in (word := line.at(names[0]).split()[0]) or word in experiments)
    ]
    told: list[str] = []
    for place, line in enumerate(lines):
        told.append(line.text)
        last = place + 1 == len(lines) or not lines[place + 1].head
        if line.head and last:
            told += [w.marked(number) for w in wanted if w.heading == line.heading]
    for heading in dict.fromkeys(w.heading for w in wanted if w.heading not in heads):
        told += ["", *_table(old, heading, [w for w in wanted if w.heading == heading], number)]
    return told


def _table(old: Sequence[str], heading: str, rows: Sequence[_Line], number: str) -> Iterator[str]:
    """What stood from a heading to its table's head, then these rows."""
    start = list(old).index(heading)
    for text in old[start:]:
        yield text
        if text.startswith(_RULE):
            break
    yield from (row.marked(number) for row in rows)


def _lines(texts: Sequence[str]) -> Iterator[_Line]:
    heading, head = "", Key()
    for text, following in zip_longest(texts, texts[1:], fillvalue=""):
        heading = text if text.startswith(_HEADINGS) else heading
        is_table = text.startswith("|")
        cells = tuple(c.strip() for c in text.strip("| ").split(" | ")) if is_table else Key()
        head = head if is_table else Key()
        is_row = len(cells) == len(head) and not text.startswith(_RULE)
        yield _Line(text, heading, head if is_row else Key(), cells)
        head = cells if following.startswith(_RULE) else head


def _plain(cell: str) -> str:
    return cell.removesuffix(MARK).removesuffix(CHANGED).rstrip()
