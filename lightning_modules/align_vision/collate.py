"""Captioned pictures as tokens, and where in a caption an attribute is named.

Legend: B rows, L tokens, A positions that are read, S attributes, W values of an attribute.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.align_vision.prompts import captioned
from lightning_modules.errors import ModelError
from lightning_modules.llm.label_scoring import NO_LOSS, pad_left
from lightning_modules.llm.pictures import PictureReader
from lightning_modules.llm.wording import as_data

_ANY_SIZE = (64, 64)
NOWHERE = -1  # in place of a column or a token: the caption does not name the attribute


@dataclass
class CaptionBatch:
    """Pictures (one each), prompts with their captions, and the places where captions name attributes."""

    tokens: Tensor  # (B, L) padded on the left, without the last
    token_mask: Tensor  # (B, L)
    answers: Tensor  # (B, A) next token at the last A positions, NO_LOSS = no loss
    keys: list[str]  # (B,) digests of the pictures
    pixels: dict[str, Tensor]  # what the vision tower reads of them
    normaliser: Tensor  # () divide the summed loss by this
    column: Tensor  # (B, S) of the A positions, where the value's first token is foretold; NOWHERE
    choices: Tensor  # (B, S, W) the first token of each value there; NOWHERE where there are fewer
    truth: Tensor  # (B, S) the right one of W

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CaptionBatch:
        """The same batch on another device (Lightning calls this)."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(each) for name, each in value.items()}
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return value

        return CaptionBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class CaptionTokens:
    """How rows become tokens: a row has a ``picture`` (PIL), a ``caption`` and ``attributes`` by name.

    Args:
        reader: of the model.
        values: what each attribute may be, over all of the data.
        limit: tokens that the model reads.
    """

    reader: PictureReader
    values: Mapping[str, Sequence[str]]
    limit: int

    @cached_property
    def _chat(self) -> bool:
        return self.reader.spec.chat_template

    def texts(self, caption: str) -> tuple[str, str]:
        """Prompt, with the picture's tokens, and answer."""
        (told,) = as_data([caption], self.reader.tokenizer)
        prompt, answer = captioned(self.reader.tokenizer, self._chat, told)
        return self.reader.expand(prompt, [_ANY_SIZE]), answer

    def of(self, caption: str) -> tuple[list[int], int]:
        """Token ids of prompt and answer, and how many of them are the prompt's.

        A picture of any size is as many tokens, in the models that are aligned here.

        Raises:
            ModelError: they are more than the model reads.
        """
        shown, answer = self.texts(caption)
        encoded = self._encoded(shown + answer)
        before = sum(1 for _, end in encoded["offset_mapping"] if end <= len(shown))
        ids: list[int] = encoded["input_ids"]
        if len(ids) > self.limit:
            raise ModelError(
                f"a picture and its caption are {len(ids)} tokens, more than llm.max_length={self.limit}: "
                "raise it, or shorten the captions"
            )
        return ids, before

    def prompt_tokens(self, asked: tuple[str, str]) -> list[int]:
        """Token ids of one way to ask, behind which any caption may stand."""
        prompt, _ = captioned(self.reader.tokenizer, self._chat, "", [asked])
        ids: list[int] = self._encoded(self.reader.expand(prompt, [_ANY_SIZE]))["input_ids"]
        return ids

    def slots(
        self, caption: str, attributes: Mapping[str, str]
    ) -> list[tuple[int, list[int], int]]:
        """Of each attribute (S): the token that names it, the first token of each value, which is right.

        ``NOWHERE`` and no values where the caption does not name it; they are looked for in their order.
        """
        shown, answer = self.texts(caption)
        found: list[tuple[int, list[int], int]] = []
        taken = len(shown)
        for name, options in self.values.items():
            value = attributes.get(name)
            place = None if value is None else _named(shown + answer, value, taken)
            if value is None or place is None:
                found.append((NOWHERE, [], 0))
                continue
            taken = place + len(value)  # a later attribute of the same value is named further on
            text = shown + answer
            encoded = self._encoded(text)
            number = sum(1 for _, end in encoded["offset_mapping"] if end <= place)
            other = [text[:place] + option + text[taken:] for option in options]
            firsts = [self._encoded(each)["input_ids"][number] for each in other]
            found.append((number, firsts, list(options).index(value)))
        return found

    def _encoded(self, text: str) -> Any:
        return self.reader.tokenizer(
            text, add_special_tokens=not self._chat, return_offsets_mapping=True
        )


def _named(text: str, value: str, start: int) -> int | None:
    """Where a value stands as whole words from ``start`` on."""
    found = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)").search(text, start)
    return found.start() if found else None


@dataclass(frozen=True)
class CaptionCollator:
    """Rows of captioned pictures as a batch; ``slots`` (validation) with the places of their attributes."""

    tokens: CaptionTokens
    slots: bool

    def __call__(self, rows: Any) -> CaptionBatch:
        """``rows.rows`` (B,), each with ``picture``, ``caption`` and ``attributes``.

        ``rows.filler`` (B,) marks rows that only keep ranks in step, ``rows.normaliser`` divides the loss.
        """
        read, said, places = [], [], []
        idle = np.zeros(len(rows.rows), bool) if rows.filler is None else rows.filler
        for row, skipped in zip(rows.rows, idle, strict=True):
            ids, prompt = self.tokens.of(row.caption)
            answer = ids[prompt:]
            read.append(ids[:-1])
            said.append([NO_LOSS] * len(answer) if skipped else answer)
            if self.slots:
                slots = self.tokens.slots(row.caption, row.attributes)
                # Counted from the end: rows are padded on the left.
                places.append([(n - len(ids) if n >= 0 else None, c, t) for n, c, t in slots])
        tokens, mask = pad_left(read, self.tokens.reader.tokenizer.pad_token_id)
        answers, _ = pad_left(said, NO_LOSS)
        pictures = [row.picture for row in rows.rows]
        normaliser = torch.tensor(rows.normaliser, dtype=torch.float32)
        pixels = self.tokens.reader.pictures(pictures)
        keys = [picture_digest(picture) for picture in pictures]
        where = _slot_tensors(places, answers.shape[1])
        return CaptionBatch(tokens, mask, answers, keys, pixels, normaliser, *where)


def _slot_tensors(places: list[list[Any]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (B, S), choices (B, S, W) and truth (B, S)."""
    count = max((len(row) for row in places), default=0)
    most = max((len(choices) for row in places for _, choices, _ in row), default=0)
    column = torch.full((len(places), count), NOWHERE)
    choices = torch.full((len(places), count, most), NOWHERE)
    truth = torch.zeros(len(places), count, dtype=torch.long)
    for i, row in enumerate(places):
        for j, (from_end, options, right) in enumerate(row):
            if from_end is not None:
                column[i, j] = width + from_end
                choices[i, j, : len(options)] = torch.tensor(options)
                truth[i, j] = right
    return column, choices, truth


def picture_digest(picture: Any) -> str:
    """Names a picture by its size and pixels."""
    rgb = picture.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()[:32]
