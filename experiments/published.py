"""What papers published, cell by cell, and which experiments fill the same cells here: ``papers/*.yaml``.

The one place of these numbers: an experiment's ``expected`` names a cell as
``${published:paper,table,row,column}``, and ``make table`` prints all. A file has ``title``, ``source``,
``differs`` (by size, what sets our protocol apart) and ``tables``. A table has ``table`` (its number),
``told``, ``metric``, ``scale`` (of the printed numbers), ``columns`` and ``rows``; a row has ``method``,
``published`` (a number a column, as printed; null where there is none) and, for each size, what fills it:
``NAME[:STAGE] key=value ...``, where ``{run}``, ``{data}`` and the like are the column's, or
``none: why there is no experiment``, for all columns or by column (``rest`` are the others). ``cpu`` of a
table are the columns of the small grid, each ``like`` a published one, or ``none: why``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from experiments.errors import UserError
from experiments.keys import nearest

ROOT = Path(__file__).resolve().parent / "papers"
SIZES = ("paper", "cpu")
NONE = "none:"


@dataclass(frozen=True)
class Cell:
    """A published number and what fills the same place here.

    Args:
        row, column, metric: where it stands, and what is measured.
        published: None where the paper has no number.
        like: the published column, where the cell's own is of other data.
        run: an experiment as ``NAMES`` of ``make compare`` has it; empty where there is none.
        why: the reason for that.
    """

    row: str
    column: str
    metric: str
    published: float | None
    like: str
    run: str
    why: str


@dataclass(frozen=True)
class Grid:
    """A table at one size; ``why`` says why this size has none of it."""

    table: str
    told: str
    cells: tuple[Cell, ...]
    why: str = ""


def names() -> list[str]:
    """The papers whose tables are here."""
    return sorted(f.stem for f in ROOT.glob("*.yaml"))


def read(paper: str) -> dict[str, Any]:
    """A paper's file.

    Raises:
        UserError: there is none of that name.
    """
    known = names()
    if paper not in known:
        raise UserError(f"no paper is called {paper!r}{nearest(paper, known)} ({', '.join(known)})")
    return _parsed(ROOT / f"{paper}.yaml")


@cache
def _parsed(file: Path) -> dict[str, Any]:
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def grids(paper: str, size: str) -> list[Grid]:
    """The tables of a paper at a size."""
    return [_grid(table, size) for table in read(paper)["tables"]]


def value(paper: str, table: str, row: str, column: str) -> float:
    """One published number, for an experiment's ``expected``.

    Raises:
        UserError: there is no such cell, or it has no number.
    """
    for grid in grids(paper, SIZES[0]):
        for cell in grid.cells if grid.table == str(table) else ():
            if (cell.row, cell.column) == (row, column) and cell.published is not None:
                return cell.published
    raise UserError(f"{paper} has no published number in table {table}, {row}, {column}")


def _grid(table: dict[str, Any], size: str) -> Grid:
    columns = table["columns"] if size == SIZES[0] else table[size]
    name, told = str(table["table"]), str(table["told"])
    if isinstance(columns, str):
        return Grid(name, told, (), columns.removeprefix(NONE).strip())
    return Grid(name, told, tuple(_cells(table, columns, size)))


def _cells(table: dict[str, Any], columns: dict[str, dict[str, str]], size: str) -> Iterator[Cell]:
    places = {column: number for number, column in enumerate(table["columns"])}
    for row in table["rows"]:
        assert len(row["published"]) == len(places), (table["table"], row["method"])
        for column, spec in columns.items():
            like = spec.get("like", column)
            printed = row["published"][places[like]]
            text = _filled(row[size], column, spec)
            none = text.startswith(NONE)
            yield Cell(
                str(row["method"]), column, spec.get("metric") or table["columns"][like].get("metric")
                or table["metric"],
                None if printed is None else round(printed * table.get("scale", 1), 6),
                "" if like == column else like,
                "" if none else text, text.removeprefix(NONE).strip() if none else "",
            )  # fmt: skip


def _filled(given: str | dict[str, str], column: str, spec: dict[str, str]) -> str:
    text = given if isinstance(given, str) else given.get(column) or given["rest"]
    if text.startswith(NONE):
        return text
    fields = {name: spec.get(name, "") for _, name, _, _ in Formatter().parse(text) if name}
    return " ".join(text.format(**fields).split())
