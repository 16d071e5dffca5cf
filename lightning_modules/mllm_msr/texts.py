"""What prompts say of users and of items, in the words of their data, cut to what there is room for.

Legend: B rows, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from datamodules.types import Rows
from lightning_modules.errors import ModelError
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.wording import as_data, cut_to, token_ids
from lightning_modules.mllm_msr.preferences import Preferences
from lightning_modules.mllm_msr.prompts import BETWEEN, CANDIDATE, USER, PairPrompt

_SLACK = 4  # tokens: a text may be cut into others where it stands


@dataclass(frozen=True)
class Frames:
    """A prompt's two parts, with marks where what is known of the user and of the item belongs."""

    user: str
    item: str
    candidate_first: bool

    @classmethod
    def of(cls, prompt: PairPrompt, tokenizer: Any, chat_template: bool) -> Frames:
        """Laid out.

        Raises:
            ModelError: the chat template does not show a message once, as it is.
        """
        text = lay_out(tokenizer, chat_template, prompt.instruction(), prompt.marked())
        if any(text.count(mark) != 1 for mark in (USER, CANDIDATE, BETWEEN)):
            raise ModelError(
                "the chat template changes what a message says: take llm.chat_template=false"
            )
        first, second = text.split(BETWEEN)
        parts = (second, first) if prompt.candidate_first else (first, second)
        return cls(*parts, prompt.candidate_first)

    def whole(self, user: str, item: str) -> str:
        """The prompt that a user's part and an item's part make."""
        return item + user if self.candidate_first else user + item


class ItemTexts:
    """The items' parts of prompts.

    Args:
        frames, prompt: where they stand, and their words.
        tokenizer: of the language model.
        titles: (I,).
        details: (I,) what else is told, or none.
        most: tokens of a title and its details, at most.
        pictured: (I + 1,) bool, whose picture is shown, at a mark; None: of none.
    """

    def __init__(
        self,
        frames: Frames,
        prompt: PairPrompt,
        tokenizer: Any,
        titles: Sequence[str],
        details: Sequence[str],
        most: int,
        pictured: np.ndarray | None = None,
    ) -> None:
        plain = cut_to(tokenizer, as_data(titles, tokenizer), [most] * len(titles))
        self.titles = ["", *plain]  # (I + 1,) as prompts have them
        counts = [len(ids) for ids in token_ids(tokenizer, plain)] if details else []
        told = as_data(details, tokenizer) or [""] * len(titles)
        rooms = [most - count for count in counts] or [0] * len(titles)
        shows = [False] * len(titles) if pictured is None else pictured[1:].tolist()
        each = zip(plain, cut_to(tokenizer, told, rooms), shows, strict=True)
        made = (frames.item.replace(CANDIDATE, prompt.candidate(*one)) for one in each)
        self.parts = ["", *made]  # (I + 1,)


class UserTexts:
    """The users' parts of prompts.

    Args:
        frames, prompt: where they stand, and their words.
        tokenizer: of the language model.
        titles: (I + 1,) as prompts have them.
        preferences: told in place of titles.
        room: tokens that a user's part may have.
        max_length: newest titles that are listed, at most.
    """

    def __init__(
        self,
        frames: Frames,
        prompt: PairPrompt,
        tokenizer: Any,
        titles: Sequence[str],
        preferences: Preferences | None,
        room: int,
        max_length: int,
    ) -> None:
        self.frames, self.prompt, self.tokenizer = frames, prompt, tokenizer
        self.titles, self.preferences = titles, preferences
        self.room, self.max_length = room, max_length

    reserved = 0  # tokens that heirs tell of a user besides, at most

    def __call__(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """(B,) of rows without their ``skip`` (B,) oldest events, or so many last words of a preference."""
        return [self._framed(known) for known in self._known(rows, skip)]

    def _framed(self, known: str) -> str:
        return self.frames.user.replace(USER, known)

    def _known(self, rows: Rows, skip: np.ndarray) -> list[str]:
        if self.preferences is not None:
            texts = [self.told[i] for i in self.preferences.of(rows)]
            pairs = zip(texts, skip.tolist(), strict=True)
            shorter = (" ".join(text.split()[:-most]) if most else text for text, most in pairs)
            return [self.prompt.preference(text) for text in shorter]
        first = np.maximum(rows.start, rows.stop - self.max_length) + skip
        stretches = zip(first, rows.stop, strict=True)
        items = rows.histories.items
        return [self.prompt.history([self.titles[i] for i in items[a:b]]) for a, b in stretches]

    @cached_property
    def told(self) -> list[str]:
        """The preferences' texts as prompts have them: their first words, as many as fit.

        Raises:
            ModelError: none fits.
        """
        assert self.preferences is not None
        (empty,) = token_ids(self.tokenizer, [self._framed(self.prompt.preference("-"))])
        room = self.room - len(empty) - self.reserved - _SLACK
        if room < 1:
            raise ModelError(
                "llm.max_length leaves a preference no token beside a candidate: raise it, or lower "
                "text_tokens"
            )
        return cut_to(self.tokenizer, self._plain, [room] * len(self._plain))

    @cached_property
    def _plain(self) -> list[str]:
        assert self.preferences is not None
        return as_data([text or "" for text in self.preferences.texts], self.tokenizer)

    @property
    def cut(self) -> int:
        """Preferences that lost their last words."""
        if self.preferences is None:
            return 0
        return sum(a != b for a, b in zip(self._plain, self.told, strict=True))
