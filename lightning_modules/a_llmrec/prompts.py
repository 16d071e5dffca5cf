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
from typing import Any

import numpy as np
import torch

from datamodules.types import NO_TITLE, Batch, ItemWords, Rows
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.llm.label_scoring import NO_LOSS, pad_left
from lightning_modules.llm.layouts import lay_out

USER = -1  # in ``Batch.slots``
# Private code points that no text has: where a prompt's text is cut.
_USER, _HISTORY, _CANDIDATES = "\ue000", "\ue001", "\ue002"
_NOTHING = "(nothing so far)"
LONGEST_REQUEST = 300  # characters


def question(words: ItemWords, user_token: bool, request: str | None = None) -> str:
    """The message, with marks where the user's token and the two lists belong; each line ends in a break."""
    wish = f'They say what they are looking for: "{request}"\n' if request else ""
    who = f"{_USER} stands for one person. They have" if user_token else "Somebody has"
    return (
        f"{who} {words.past} these {words.plural}, the oldest first:\n{_HISTORY}{wish}Which {words.singular} "
        f"will they {words.present} next? Choose one of these {words.plural}:\n{_CANDIDATES}Answer with its "
        "title in quotation marks and nothing else."
    )


def as_data(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Texts of others, each as one line that can end neither its quotes nor the message it stands in."""
    special = {
        *tokenizer.all_special_tokens,
        *tokenizer.get_added_vocab(),
        _USER,
        _HISTORY,
        _CANDIDATES,
    }
    marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    return [" ".join(marks.sub(" ", text).replace('"', "'").split()) for text in texts]


def required_request(request: str, tokenizer: Any) -> str:
    """A user's words ``as_data``; raises ValueError where nothing is left, or too much."""
    (kept,) = as_data([request], tokenizer)
    if not 1 <= len(kept) <= LONGEST_REQUEST:
        raise ValueError(
            f"a request has {len(kept)} characters, expected 1 to {LONGEST_REQUEST}: say it in a sentence"
        )
    return kept


def required_words(words: ItemWords | None) -> ItemWords:
    """The data's words; raises ValueError where there are none: a prompt would lack its question."""
    if words is None:
        raise ValueError(
            "the data do not say what their items are called: give the data config words, such as {_target_: "
            "datamodules.types.ItemWords, singular: film, plural: films, present: watch, past: watched}"
        )
    return words


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
    ) -> None:
        self.request = None if request is None else required_request(request, tokenizer)
        self.tokenizer, self.words, self.titles = tokenizer, words, titles
        self.chat_template, self.limit = chat_template, limit
        self.max_length, self.title_tokens = max_length, title_tokens
        self.user_token, self.item_tokens = user_token, item_tokens
        self.cut_events = 0  # history items that did not fit, over the rows that were measured

    # Tokens made once ----------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens before the user's slot, up to the history, up to the candidates, and to the end.

        Without a user's slot the first piece is empty.

        Raises:
            ValueError: the chat template does not show a message once, as it is.
        """
        text = lay_out(
            self.tokenizer, self.chat_template, question(self.words, self.user_token, self.request)
        )
        parts = re.split(f"[{_USER}{_HISTORY}{_CANDIDATES}]", text)
        if len(parts) != 3 + self.user_token:
            raise ValueError(
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
    def _nothing(self) -> np.ndarray:
        """The line of an empty history."""
        (ids,) = self._behind("\n", [f"{_NOTHING}\n"])
        return np.array(ids, dtype=np.int64)

    def _behind(self, anchor: str, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts as they follow ``anchor``: some tokenizers mark the beginning of a text."""

        def cut(asked: Sequence[str]) -> list[list[int]]:
            ids: list[list[int]] = self.tokenizer(list(asked), add_special_tokens=False)[
                "input_ids"
            ]
            return ids

        (start,) = cut([anchor])
        made = cut([anchor + text for text in texts])
        for text, ids in zip(texts, made, strict=True):
            if ids[: len(start)] != start:
                raise ValueError(
                    f"this tokenizer joins {anchor!r} and what follows in {anchor + text!r} into one token: "
                    "choose another language model"
                )
        return [ids[len(start) :] for ids in made]

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
        return [self._row(rows, row, int(shown[row])) for row in range(len(rows.row))]

    def _row(self, rows: Rows, row: int, shown: int) -> tuple[np.ndarray, np.ndarray]:
        assert rows.candidates is not None
        first, second, third, fourth = self.pieces
        stop = int(rows.stop[row])
        history = self._list(rows.histories.items[stop - shown : stop])
        candidates = self._list(rows.candidates[row])
        user = np.array([self.tokenizer.pad_token_id] * self.user_token, dtype=np.int64)
        if not shown:
            history = (self._nothing, np.zeros_like(self._nothing))
        tokens = np.concatenate([first, user, second, history[0], third, candidates[0], fourth])
        slots = np.zeros_like(tokens)
        slots[len(first) : len(first) + len(user)] = USER
        at = len(first) + len(user) + len(second)
        slots[at : at + len(history[1])] = history[1]
        at += len(history[1]) + len(third)
        slots[at : at + len(candidates[1])] = candidates[1]
        return tokens, slots

    def _list(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lines of items, of which 0 is padding."""
        tokens, slots, ends = self._lines
        index = np.concatenate(
            [np.arange(0), *(np.arange(ends[i], ends[i + 1]) for i in items.tolist())]
        )
        return tokens[index], slots[index]

    def _recent(self, rows: Rows) -> np.ndarray:
        """(R,) items of each history that would be shown if they fit."""
        return np.minimum(rows.stop - rows.start, self.max_length)

    def _fitting(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(R,) tokens of each prompt, and (R,) newest items that it shows.

        Raises:
            ValueError: rows without candidates, or a prompt that is too long without any history.
        """
        if rows.candidates is None:
            raise ValueError(
                "A-LLMRec chooses among candidates, and these rows have none: give data.candidates a set, "
                "such as UniformCandidates(count=19)"
            )
        line = np.diff(self._lines[2])  # (I + 1,) tokens
        fixed = sum(map(len, self.pieces)) + self.user_token
        asked = fixed + line[rows.candidates].sum(1)  # (R,)
        shown = self._recent(rows)
        place = rows.stop[:, None] - 1 - np.arange(self.max_length)  # (R, T) newest first
        real = np.arange(self.max_length) < shown[:, None]
        each = np.where(real, line[rows.histories.items[np.where(real, place, 0)]], 0)
        total = np.concatenate([np.zeros((len(each), 1), np.int64), each.cumsum(1)], axis=1)
        total[:, 0] = len(self._nothing)
        fits = (asked[:, None] + total <= self.limit) & (
            np.arange(self.max_length + 1) <= shown[:, None]
        )
        if not fits.any(1).all():
            worst = int((asked + len(self._nothing)).max())
            raise ValueError(
                f"a prompt without any history has {worst} tokens, but {self.limit} are allowed: raise "
                "llm.max_length, or lower title_tokens"
            )
        # The most items that fit; total grows with them, but for the line of an empty history.
        shown = self.max_length - fits[:, ::-1].argmax(1)
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
