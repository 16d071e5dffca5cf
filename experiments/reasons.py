"""What a language model says of an item, held against the item's metadata. No torch here.

A statement is a clause. It stands if it names at least one attribute that the metadata know (a category, a
brand, a year, a title in quotes) and every attribute that it names is the item's own, or a title that the
user has. All others are taken out and counted: nobody can say whether they are true.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import polars as pl

from experiments.titles import plain

_CLAUSES = re.compile(
    r"\s*(?:[;,.!?]\s+|[;.!?]$|\s(?:and|but|because|while|which|as well as)\s)\s*"
)
_YEARS = re.compile(r"\b(?:19|20)\d\d\b")
_QUOTED = re.compile('["“”]([^"“”]+)["“”]')


@dataclass(frozen=True)
class Checked:
    """What is left of a reason."""

    text: str | None  # None: nothing
    kept: int
    dropped: int


class Metadata:
    """Categories and brands of a catalogue, as they are compared.

    Args:
        catalog: columns categories and brand; row ``i`` is the internal item ``i + 1``.
    """

    def __init__(self, catalog: pl.DataFrame) -> None:
        self.catalog = catalog.select("categories", "brand")
        categories = catalog["categories"].explode().drop_nulls().unique().to_list()
        self.known = _plain([*categories, *catalog["brand"].drop_nulls().unique().to_list()])

    def of(self, item: int) -> set[str]:
        """Those of one internal item."""
        categories, brand = self.catalog.row(item - 1)
        return _plain([*(categories or ()), brand or ""])


def _plain(values: Iterable[str]) -> set[str]:
    return {words for value in values if (words := plain(value))}


def checked(
    reason: str,
    own: Collection[str],
    known: Collection[str],
    title: str,
    titles: Collection[str],
) -> Checked:
    """The statements of a reason that the metadata support.

    Args:
        reason: as the model wrote it.
        own: of the item, see ``Metadata``.
        known: of all items.
        title: of the item, which may end with its year.
        titles: of what the user has.
    """
    said = re.sub(r"^because\s+", "", reason.strip())
    clauses = [clause for clause in _split(said) if plain(clause)]
    years = set(_YEARS.findall(title))
    shown = {plain(t) for t in (title, *titles)}
    kept = [c for c in clauses if _stands(c, own, known, years, shown)]
    text = f"because {', '.join(kept)}" if kept else None
    return Checked(text, len(kept), len(clauses) - len(kept))


def _split(text: str) -> list[str]:
    """Clauses; what stands in quotes stays whole."""
    quoted = [m.span() for m in _QUOTED.finditer(text)]
    parts, at = [], 0
    for cut in _CLAUSES.finditer(text):
        if any(a < cut.start() < b for a, b in quoted):
            continue
        parts.append(text[at : cut.start()])
        at = cut.end()
    return [*parts, text[at:]]


def _stands(
    clause: str,
    own: Collection[str],
    known: Collection[str],
    years: Collection[str],
    shown: Collection[str],
) -> bool:
    quotes = {plain(q) for q in _QUOTED.findall(clause)}
    unquoted = _QUOTED.sub(" ", clause)
    said = f" {plain(unquoted)} "
    named = {words for words in known if f" {words} " in said}
    dated = set(_YEARS.findall(unquoted))
    right = named <= set(own) and dated <= set(years) and quotes <= set(shown)
    return bool(named or dated or quotes) and right
