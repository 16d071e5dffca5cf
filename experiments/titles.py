"""Items as people name them: raw ids and titles, and what was probably meant by others. No torch here."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

from experiments.errors import UserError

SHOWN = 3  # near items that are told
_NEAR = 0.6  # likeness of titles (difflib's ratio) that are worth telling
_YEAR = re.compile(r"\s*\((?:19|20)\d\d\)\s*$")
_ARTICLE = re.compile(r"^(.*), (the|a|an|le|la|les|der|die|das|il|el)$")
MANY = 20_000  # titles that are compared one by one; of more, those that share a word


def plain(title: str) -> str:
    """A title as it is compared: small letters, ``matrix, the (1999)`` as ``the matrix``, no punctuation."""
    text = _YEAR.sub("", title.casefold().strip())
    if moved := _ARTICLE.match(text):
        text = f"{moved[2]} {moved[1]}"
    return " ".join(re.findall(r"\w+", text))


class ItemNames:
    """Finds items by what somebody has typed.

    Args:
        ids: (I,) raw ids; internal ids count from 1.
        titles: (I,).
        name: of the data, for messages.
    """

    def __init__(self, ids: Sequence[str], titles: Sequence[str], name: str) -> None:
        self.ids, self.titles, self.name = list(ids), list(titles), name

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {raw: i for i, raw in enumerate(self.ids, start=1)}

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        """Titles as they are, but for capitals."""
        found: dict[str, list[int]] = defaultdict(list)
        for i, title in enumerate(self.titles, start=1):
            found[title.casefold().strip()].append(i)
        return dict(found)

    @cached_property
    def _by_plain(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for i, title in enumerate(self.titles, start=1):
            if words := plain(title):
                found[words].append(i)
        return dict(found)

    @cached_property
    def _by_word(self) -> dict[str, list[str]]:
        """Plain titles by their words."""
        found: dict[str, list[str]] = defaultdict(list)
        for title in self._by_plain:
            for word in set(title.split()):
                found[word].append(title)
        return dict(found)

    def knows(self, raw: str) -> bool:
        """Whether there is an item of this raw id."""
        return raw in self._by_id

    def of_id(self, raw: str) -> int:
        """The internal item of a raw id.

        Raises:
            UserError: there is none; near ones are told.
        """
        if raw in self._by_id:
            return self._by_id[raw]
        raise self._unknown(raw, self._near_ids(raw))

    def named(self, words: str) -> int | None:
        """As ``find``, without a look at titles that are only like it.

        Raises:
            UserError: several items have that name.
        """
        same = self._by_title.get(words.casefold(), [])
        exact = {*same, self._by_id[words]} if words in self._by_id else same
        for found in (sorted(exact), self._by_plain.get(plain(words), [])):
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(
                    f"{self.name} has {len(found)} items named {words!r}: give the id of "
                    f"{self._told(found[:SHOWN], ' or of ')}"
                )
        return None

    def find(self, words: str) -> int:
        """The internal item of a raw id or a title; one that stands so comes before one that is like it.

        Raises:
            UserError: no item or several; near ones are told.
        """
        words = words.strip()
        if found := self.named(words):
            return found
        raise self._unknown(words, self.near(words) or self._near_ids(words))

    def raw(self, words: str) -> str:
        """The raw id of an item that is named by it or by its title; raises UserError as ``find``."""
        return words if self.knows(words) else self.ids[self.find(words) - 1]

    def near(self, words: str) -> list[int]:
        """Items whose titles hold the words, or else are like them."""
        wanted = plain(words)
        if not wanted:
            return []
        known = self._candidates(wanted)
        holding = sorted((t for t in known if len(wanted) > 2 and wanted in t), key=len)[:SHOWN]
        close = difflib.get_close_matches(wanted, known, SHOWN, _NEAR)
        titles = list(dict.fromkeys([*holding, *close]))
        return [item for title in titles for item in self._by_plain[title]][:SHOWN]

    def _near_ids(self, raw: str) -> list[int]:
        near = difflib.get_close_matches(raw, self.ids, SHOWN) if len(self.ids) <= MANY else []
        return [self._by_id[each] for each in near]

    def _unknown(self, words: str, near: list[int]) -> UserError:
        hint = f"; did you mean {self._told(near)}?" if near else self._such_as()
        return UserError(f"{self.name} has no item {words!r}{hint}")

    def _candidates(self, wanted: str) -> list[str]:
        if len(self._by_plain) <= MANY:
            return list(self._by_plain)
        lists = (self._by_word.get(w, []) for w in wanted.split())
        rare = sorted(filter(None, lists), key=len)[:2]
        return list(dict.fromkeys(title for each in rare for title in each[:MANY]))

    def _told(self, items: Iterable[int], between: str = " or ") -> str:
        return between.join(f"{self.ids[i - 1]} ({self.titles[i - 1]})" for i in items)

    def _such_as(self) -> str:
        some = self._told(range(1, min(SHOWN, len(self.ids)) + 1), ", ")
        return f"; it has {len(self.ids):,} items, such as {some}"
