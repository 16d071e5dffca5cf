"""A-LLMRec's question in words, and prompts that are put together from tokens made once.

Kim et al., KDD 2024 (arXiv 2404.11343): a user's soft token, the newest items, twenty candidates, each title
with a soft token behind it; the wording is our own.

Legend: B rows, R all rows of a split, T items of a history, C candidates, I items, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch

from datamodules.types import NO_TITLE, Batch, ItemWords, Rows
from lightning_modules.a_llmrec.wording import (
    CANDIDATES_MARK,
    HISTORY_MARK,
    USER_MARK,
    question,
    required_request,
)
from lightning_modules.errors import ModelError
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.llm.label_scoring import NO_LOSS, pad_left
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.prompt_tokens import tokens_behind
from lightning_modules.llm.wording import as_data

USER = -1  # in ``Batch.slots``
_NOTHING = "(nothing so far)"


def before_target(rows: Rows) -> Rows:
    """The rows with ``target``, and ``stop`` at its place: of training rows it is the newest event."""
    if rows.target is not None:
        return rows
    newest = rows.stop - 1
    return replace(rows, stop=newest, target=rows.histories.items[newest].astype(np.int64))


class ChoiceTable:
    """Tokens of prompts and answers. What is fixed, and each title, is tokenised once, whatever the rows.

    A line of a list is a quoted title, the item's slot, and a line break. Slots hold the padding's id; what
    is read there is the vector that ``Batch.slots`` names.

    Args:
        tokenizer: of transformers.
        words: what items are called.
        titles: (I,) of items 1..I; null and blank ones are ``NO_TITLE``.
        chat_template: lay the message out in the tokenizer's chat template, or as Alpaca does.
        limit: tokens a prompt may have; the oldest items go until it fits, never a candidate.
        max_length: newest items that are shown.
        title_tokens: tokens of a quoted title, at most.
        user_token: begin with the user's slot.
        item_tokens: a slot behind each title.
        request: what the users say that they are looking for.
        lettered: each candidate has a letter before it, which is asked for in place of the title.
    """

    def __init__(
        self,
        tokenizer: Any,
        words: ItemWords,
        titles: Sequence[str | None],
        chat_template: bool,
        limit: int,
        max_length: int = 10,
        title_tokens: int = 32,
        user_token: bool = True,
        item_tokens: bool = True,
        request: str | None = None,
        lettered: bool = False,
    ) -> None:
        self.lettered = lettered
        self.request: str | None = None
        self.tokenizer, self.words, self.titles = tokenizer, words, titles
        self.chat_template, self.limit = chat_template, limit
        self.max_length, self.title_tokens = max_length, title_tokens
        self.user_token, self.item_tokens = user_token, item_tokens
        self.cut_events = 0  # history items that did not fit, over the rows that were measured
        self._asked: str | None = None
        self.ask(request)

    def ask(self, request: str | None) -> None:
        """Prompts hold this request from here on."""
        if request != self._asked:
            self.request = None if request is None else required_request(request, self.tokenizer)
            self._asked = request
            self.__dict__.pop("pieces", None)

    # Tokens made once ----------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens before the user's slot, up to the history, up to the candidates, and to the end.

        Without a user's slot the first piece is empty.

        Raises:
            ModelError: the chat template does not show a message once, as it is.
        """
        asked = question(self.words, self.user_token, self.request, self.lettered)
        text = lay_out(self.tokenizer, self.chat_template, asked)
        parts = re.split(f"[{USER_MARK}{HISTORY_MARK}{CANDIDATES_MARK}]", text)
        if len(parts) != 3 + self.user_token:
            raise ModelError(
                "the chat template changes what a message says: take llm.chat_template=false"
            )
        begin: list[int] = self.tokenizer(parts[0], add_special_tokens=not self.chat_template)[
            "input_ids"
        ]
        rest = self._behind("\n", parts[1:])
        found = [begin, *rest] if self.user_token else [[], begin, *rest]
        first, second, third, fourth = (np.array(ids, dtype=np.int64) for ids in found)
        return first, second, third, fourth

    @cached_property
    def _quoted(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens of all quoted titles, (I + 2,) where each item's begin, and how many were too long."""
        plain = as_data([title or "" for title in self.titles], self.tokenizer)
        made = self._behind("\n", [f'"{title or NO_TITLE}"' for title in plain])
        (quote,) = self._behind("x", ['"'])
        long = [i for i, ids in enumerate(made) if len(ids) > self.title_tokens]
        for i in long:
            made[i] = made[i][: self.title_tokens - len(quote)] + quote
        offsets = np.cumsum([0, 0, *map(len, made)])
        return np.array([i for ids in made for i in ids], dtype=np.int64), offsets, len(long)

    @cached_property
    def _lines(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and slots of the lines of all items, and (I + 2,) where each item's begin."""
        flat, offsets, _ = self._quoted
        (ending,) = self._behind("x", ["\n"])
        pad = [self.tokenizer.pad_token_id] * self.item_tokens
        tokens, slots = [], []
        for item in range(1, len(offsets) - 1):
            title = flat[offsets[item] : offsets[item + 1]]
            tokens.append(np.concatenate([title, np.array([*pad, *ending])]))
            mark = np.zeros(len(tokens[-1]), dtype=np.int64)
            mark[len(title) : len(title) + len(pad)] = item
            slots.append(mark)
        ends = np.cumsum([0, 0, *map(len, tokens)])
        return np.concatenate(tokens), np.concatenate(slots), ends

    @cached_property
    def letters(self) -> np.ndarray:
        """(26,) the token of each letter as an answer begins with it.

        Raises:
            ModelError: this tokenizer has none of its own for a letter.
        """
        made = self._behind("\n", list(ascii_uppercase))
        if any(len(ids) != 1 for ids in made):
            raise ModelError("this tokenizer has no token for each letter: score titles instead")
        return np.array(made, dtype=np.int64)[:, 0]

    @cached_property
    def _before_title(self) -> list[list[int]]:
        """Tokens of ``A:``, ``B:`` and so on, as they begin a line."""
        return self._behind("\n", [f"{letter}:" for letter in ascii_uppercase])

    @cached_property
    def _nothing(self) -> np.ndarray:
        """The line of an empty history."""
        (ids,) = self._behind("\n", [f"{_NOTHING}\n"])
        return np.array(ids, dtype=np.int64)

    def _behind(self, anchor: str, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts as they follow ``anchor``: some tokenizers mark the beginning of a text."""
        return tokens_behind(self.tokenizer, anchor, texts)

    @property
    def cut_titles(self) -> int:
        """Titles of more than ``title_tokens`` tokens."""
        return self._quoted[2]

    def title(self, item: int) -> list[int]:
        """Tokens of an item's quoted title."""
        flat, offsets, _ = self._quoted
        return [int(i) for i in flat[offsets[item] : offsets[item + 1]]]

    # Rows ----------------------------------------------------------------------------------------------

    def measure(self, rows: Rows) -> np.ndarray:
        """(R,) tokens of each prompt; counts what does not fit."""
        lengths, shown = self._fitting(before_target(rows))
        self.cut_events += int((self._recent(before_target(rows)) - shown).sum())
        return lengths

    def of(self, rows: Rows) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and slots (L,) of each row's prompt."""
        rows = before_target(rows)
        _, shown = self._fitting(rows)
        assert rows.candidates is not None
        return [
            self.prompt(rows.histories.items[stop - count : stop], candidates)
            for stop, count, candidates in zip(rows.stop, shown, rows.candidates, strict=True)
        ]

    def prompt(self, history: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and slots (L,) of the prompt that shows these items (T,) and (C,)."""
        first, second, third, fourth = self.pieces
        shown, listed = self._list(history), self._list(candidates, self.lettered)
        user = np.array([self.tokenizer.pad_token_id] * self.user_token, dtype=np.int64)
        if not len(history):
            shown = (self._nothing, np.zeros_like(self._nothing))
        tokens = np.concatenate([first, user, second, shown[0], third, listed[0], fourth])
        slots = np.zeros_like(tokens)
        slots[len(first) : len(first) + len(user)] = USER
        at = len(first) + len(user) + len(second)
        slots[at : at + len(shown[1])] = shown[1]
        at += len(shown[1]) + len(third)
        slots[at : at + len(listed[1])] = listed[1]
        return tokens, slots

    def _list(self, items: np.ndarray, lettered: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and slots of the lines of items, of which 0 is padding."""
        tokens, slots, ends = self._lines
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for place, item in enumerate(items.tolist()):
            if lettered and item:
                letter = np.array(self._before_title[place])
                parts.append((letter, np.zeros_like(letter)))
            line = slice(ends[item], ends[item + 1])
            parts.append((tokens[line], slots[line]))
        return np.concatenate([t for t, _ in parts]), np.concatenate([s for _, s in parts])

    def _letter_lengths(self, candidates: np.ndarray) -> np.ndarray:
        """(R,) tokens of all letters; raises ModelError where there are more candidates than letters."""
        width = candidates.shape[1]
        if width > len(ascii_uppercase):
            raise ModelError(f"{width} candidates are more than there are letters: score titles")
        each = np.array([len(ids) for ids in self._before_title[:width]])
        total: np.ndarray = (each * (candidates > 0)).sum(1)
        return total

    def _recent(self, rows: Rows) -> np.ndarray:
        """(R,) items of each history that would be shown if they fit."""
        return np.minimum(rows.stop - rows.start, self.max_length)

    def _fitting(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """``fitting`` of rows; raises ModelError where they have no candidates, too."""
        if rows.candidates is None:
            raise ModelError(
                "A-LLMRec chooses among candidates, and these rows have none: give data.candidates a set, "
                "such as UniformCandidates(count=19)"
            )
        place = rows.stop[:, None] - 1 - np.arange(self.max_length)  # (R, T)
        real = np.arange(self.max_length) < self._recent(rows)[:, None]
        newest = np.where(real, rows.histories.items[np.where(real, place, 0)], 0)
        return self.fitting(newest, rows.candidates)

    def fitting(self, newest: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R,) tokens of each prompt, and (R,) newest items that it shows.

        Args:
            newest: (R, T) items of histories, the newest first, padding (0) behind them.
            candidates: (R, C) items to choose among, in any order.

        Raises:
            ModelError: a prompt is too long without any history.
        """
        line = np.diff(self._lines[2])  # (I + 1,) tokens; none of padding
        fixed = sum(map(len, self.pieces)) + self.user_token
        asked = fixed + line[candidates].sum(1)  # (R,)
        if self.lettered:
            asked += self._letter_lengths(candidates)
        total = np.concatenate(
            [np.full((len(newest), 1), len(self._nothing)), line[newest].cumsum(1)], axis=1
        )
        there = np.arange(newest.shape[1] + 1) <= (newest > 0).sum(1)[:, None]
        fits = (asked[:, None] + total <= self.limit) & there
        if not fits.any(1).all():
            worst = int((asked + len(self._nothing)).max())
            raise ModelError(
                f"a prompt without any history has {worst} tokens, but {self.limit} are allowed: raise "
                "llm.max_length, or lower title_tokens"
            )
        # The most items that fit; total grows with them, but for the line of an empty history.
        shown = newest.shape[1] - fits[:, ::-1].argmax(1)
        return asked + np.take_along_axis(total, shown[:, None], axis=1)[:, 0], shown


@dataclass(frozen=True)
class ChoiceCollator:
    """Id batches with the tokens and slots of their prompts; in training, with the answer behind.

    ``answers`` (B, A) then holds the tokens of the target's quoted title, and the end of the text.
    """

    table: ChoiceTable
    training: bool

    def __call__(self, rows: Rows) -> Batch:
        """Rows with candidates."""
        rows = before_target(rows)
        assert rows.target is not None
        assert rows.candidates is not None
        tokenizer = self.table.tokenizer
        prompts = [(ids.tolist(), slots.tolist()) for ids, slots in self.table.of(rows)]
        answers = None
        if self.training:
            ends = [[*self.table.title(int(i)), tokenizer.eos_token_id] for i in rows.target]
            answers, _ = pad_left(ends, NO_LOSS)
            # What an answer's last token would foretell is not asked.
            prompts = [
                (ids + end[:-1], slots + [0] * (len(end) - 1))
                for (ids, slots), end in zip(prompts, ends, strict=True)
            ]
        tokens, mask = pad_left([ids for ids, _ in prompts], tokenizer.pad_token_id)
        carries = np.ones(len(rows.row)) if rows.filler is None else ~rows.filler
        return replace(
            HistoryCollator(self.table.max_length)(rows),
            tokens=tokens,
            token_mask=mask,
            slots=pad_left([slots for _, slots in prompts], 0)[0],
            answers=answers,
            target=torch.from_numpy(rows.target.astype(np.int64)),
            candidates=torch.from_numpy(rows.candidates.astype(np.int64)),
            weight=torch.from_numpy(carries.astype(np.float64)),
            normaliser=torch.tensor(rows.normaliser, dtype=torch.float32),
        )
