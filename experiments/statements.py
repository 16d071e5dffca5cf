"""What texts state of items' attributes, by words of a vocabulary, and whether it is true.

Legend: N texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

Vocabulary = Mapping[str, Sequence[str]]  # attribute -> its values
METADATA = ("title", "description", "categories", "brand")
SHORTEST = 2  # letters of a value: "A" is a word of its own
_GRAY = re.compile(r"\bgray", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """Finds a vocabulary's values in texts.

    A value is stated where it stands as whole words, in whatever case, also with a plural's s or es; of two
    values that begin at one place the longer one is stated. That a text denies one, or says it of something
    else, is not understood.

    Args:
        vocabulary: values of fewer than ``SHORTEST`` letters are left out; a value of several attributes
            counts for the first of them.
    """

    vocabulary: Vocabulary

    @cached_property
    def attribute(self) -> dict[str, str]:
        """The attribute of each value, in lower case."""
        found: dict[str, str] = {}
        for name, values in self.vocabulary.items():
            for value in values:
                if len(told := _plain(value)) >= SHORTEST:
                    found.setdefault(told, name)
        return found

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.attribute, key=lambda value: (-len(value), value))
        values = "|".join(re.escape(v).replace(r"\ ", r"\s+") for v in longest_first)
        return re.compile(rf"(?<!\w)({values})(?:e?s)?(?!\w)")

    def stated(self, text: str | None) -> set[str]:
        """The values that a text states."""
        if not text or not self.attribute:
            return set()
        return {_plain(match[1]) for match in self._pattern.finditer(_plain(text))}


def _plain(text: str) -> str:
    """In lower case, with single blanks and one spelling of grey."""
    return " ".join(_GRAY.sub("grey", text).casefold().split())


@dataclass(frozen=True)
class Counted:
    """Statements of some texts: the numbers of a rate.

    Args:
        texts: that there are, and that state anything.
        stated, false: statements by attribute, and those that nothing supports; a value counts once a text.
    """

    texts: int
    stating: int
    stated: dict[str, int]
    false: dict[str, int]

    def rate(self, attribute: str | None = None) -> tuple[int, int]:
        """False statements and all of them, of one attribute or of all."""
        names = list(self.stated) if attribute is None else [attribute]
        return sum(self.false[n] for n in names), sum(self.stated[n] for n in names)


def counted(words: Words, texts: Iterable[tuple[str | None, set[str]]]) -> Counted:
    """Count what texts state and what of it is false: the hallucination rate's numbers.

    A statement is a value of the vocabulary that stands in a text. It is false if it is neither among what
    the pictures show nor among the words of the metadata, both of the item as it is (of a user, of any item
    of the history), whatever wrong picture or text the model was shown. The rate is the false statements over
    all, pooled over the texts: ``sum_n |S_n - T_n| / sum_n |S_n|`` of what is stated, S_n, and what is true,
    T_n. A text that states nothing adds nothing to it.

    Args:
        words: of the vocabulary.
        texts: N of them with what is true; None where nothing was written.
    """
    number = stating = 0
    stated = dict.fromkeys(words.vocabulary, 0)
    false = dict.fromkeys(words.vocabulary, 0)
    for text, true in texts:
        said = words.stated(text)
        number += bool(text)
        stating += bool(said)
        for value in said:
            stated[words.attribute[value]] += 1
            false[words.attribute[value]] += value not in true
    return Counted(number, stating, stated, false)


def catalogue_vocabulary(catalog: pl.DataFrame) -> dict[str, list[str]]:
    """The catalogue's own attributes: its categories and brands."""
    kinds = catalog["categories"].explode().drop_nulls().unique().sort().to_list()
    brands = catalog["brand"].drop_nulls().unique().sort().to_list()
    found = {"category": kinds, "brand": brands}
    return {name: values for name, values in found.items() if values}


def truths(words: Words, catalog: pl.DataFrame, seen: pl.DataFrame | None) -> list[set[str]]:
    """(I + 1,) what is true of each item: the values in its metadata and in what its picture shows.

    Args:
        words: of the vocabulary.
        catalog: as it is, not as a probe shows it.
        seen: (I) lines of what the pictures show, text columns; None where nobody knows.
    """
    lists = {"categories"}
    parts = [pl.col(name).list.join(" | ") if name in lists else pl.col(name) for name in METADATA]
    told = catalog.select(pl.concat_str(parts, separator=" | ", ignore_nulls=True)).to_series()
    found = [set[str](), *(words.stated(text) for text in told)]
    if seen is not None:
        for item, values in enumerate(seen.iter_rows(), start=1):
            found[item] |= {_plain(value) for value in values if value} & words.attribute.keys()
    return found
