"""MLLM-MSR's recommender: a language model that knows a user's taste and is asked about a candidate.

Legend: B rows, C candidates, I items, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from datamodules.types import NO_TITLE, Batch, Collator, ItemWords, Rows
from lightning_modules.errors import ModelError
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.item_texts import Field, catalogue_texts, without_years
from lightning_modules.llm.branches import ReadPrompts, can_branch
from lightning_modules.llm.label_scoring import pad_left
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.wording import as_data, required_words
from lightning_modules.llm.yes_no import YesNoModule
from lightning_modules.mllm_msr.preferences import Preferences
from lightning_modules.mllm_msr.prompts import BETWEEN, CANDIDATE, USER, PairPrompt
from lightning_modules.mllm_msr.tokens import PairCollator, PairTable

_SLACK = 4  # tokens: a text that was cut may be cut into others where it stands


@dataclass(frozen=True)
class Asked:
    """Ranked rows before any candidate: their users' parts, and what was read of them where it is shared."""

    batch: Batch  # with ``tokens`` and ``token_mask`` (B, L) of the users' parts
    read: ReadPrompts | None


class MLLMMSRModule(YesNoModule):
    """Ye et al., "Harnessing Multimodal Large Language Models for Multimodal Sequential Recommendation", AAAI
    2025 (arXiv 2408.09698): the recommender, p = p(yes) / (p(yes) + p(no)) = sigmoid(margin).

    It learns from labelled rows, as every yes/no method, and scores any item of a ranked row by the margin
    behind a prompt about the user and this item. A user's part is read once for all candidates, which are
    then read in parallel behind it; with ``candidate_first``, as published, each prompt is read alone.

    Args:
        catalog, item_words: given by the runner from the data.
        llm, adapter: see ``YesNoModule``.
        preferences: the table of a stage that summarises users; None lists the newest titles instead.
        fields: of the catalogue, that are told of a candidate besides its title.
        candidate_first: show the candidate before the user.
        text_tokens: of a candidate's title and fields, at most.
        years: show the year that a film's title ends with.
        options: of the training, see ``YesNoModule``; without preferences ``max_length`` titles are shown.

    Raises:
        ValueError: data that do not say what their items are called, or see ``Preferences``.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        item_words: ItemWords | None,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        preferences: str | None = None,
        fields: Sequence[Field] = (),
        candidate_first: bool = False,
        text_tokens: int = 96,
        years: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(llm, adapter, **options)
        if text_tokens < 1:
            raise ValueError(f"text_tokens is {text_tokens}, expected at least 1")
        self.prompt = PairPrompt(required_words(item_words), candidate_first)
        self.preferences = None if preferences is None else Preferences(preferences)
        self.fields, self.text_tokens = tuple(fields), text_tokens
        titles = list(catalog["title"].fill_null(NO_TITLE))
        self.titles = titles if years else without_years(titles)  # (I,)
        self.details = catalogue_texts(catalog, self.fields, len(catalog)) if fields else []

    # Words ---------------------------------------------------------------------------------------------

    @cached_property
    def _frames(self) -> tuple[str, str]:
        """A user's part and an item's part, with a mark where what is known of them belongs.

        Raises:
            ModelError: the chat template does not show a message once, as it is.
        """
        asked = (self.prompt.instruction(), self.prompt.marked())
        text = lay_out(self.tokenizer, self.llm.chat_template, *asked)
        if any(text.count(mark) != 1 for mark in (USER, CANDIDATE, BETWEEN)):
            raise ModelError(
                "the chat template changes what a message says: take llm.chat_template=false"
            )
        first, second = text.split(BETWEEN)
        return (second, first) if self.prompt.candidate_first else (first, second)

    @cached_property
    def shown(self) -> list[str]:
        """(I + 1,) titles as prompts have them."""
        return ["", *self._within(as_data(self.titles, self.tokenizer), self.text_tokens)]

    @cached_property
    def item_texts(self) -> list[str]:
        """(I + 1,) the items' parts of prompts."""
        details = as_data(self.details, self.tokenizer) or [""] * len(self.titles)
        counts = self._counts(self.shown[1:])
        rooms = [max(0, self.text_tokens - count) for count in counts]
        told = self._within(details, rooms)
        _, frame = self._frames
        pairs = zip(self.shown[1:], told, strict=True)
        return ["", *(frame.replace(CANDIDATE, self.prompt.candidate(*pair)) for pair in pairs)]

    def user_texts(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """The users' parts (B,) of rows without their ``skip`` (B,) oldest events, or last words."""
        frame, _ = self._frames
        return [frame.replace(USER, known) for known in self._known(rows, skip)]

    def _known(self, rows: Rows, skip: np.ndarray) -> list[str]:
        if self.preferences is not None:
            texts = [self.told[i] for i in self.preferences.of(rows)]
            pairs = zip(texts, skip.tolist(), strict=True)
            shorter = (" ".join(text.split()[:-most]) if most else text for text, most in pairs)
            return [self.prompt.preference(text) for text in shorter]
        first = np.maximum(rows.start, rows.stop - self.max_length) + skip
        stretches = zip(first, rows.stop, strict=True)
        items = rows.histories.items
        return [self.prompt.history([self.shown[i] for i in items[a:b]]) for a, b in stretches]

    @cached_property
    def told(self) -> list[str]:
        """The preferences' texts as prompts have them: their first words, as many as fit."""
        assert self.preferences is not None
        frame, _ = self._frames
        (empty,) = self._counts([frame.replace(USER, self.prompt.preference("-"))])
        room = self.table.limit - empty - _SLACK
        if room < 1:
            raise ModelError(
                f"llm.max_length={self.llm.max_length} leaves a preference no token beside a candidate: "
                "raise it, or lower text_tokens"
            )
        texts = as_data([text or "" for text in self.preferences.texts], self.tokenizer)
        return self._within(texts, room)

    def _counts(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def _within(self, texts: Sequence[str], most: int | Sequence[int]) -> list[str]:
        """Texts cut to so many tokens each; those that fit stay as they are."""
        rooms = [most] * len(texts) if isinstance(most, int) else list(most)
        # No token is shorter than a byte: most texts need not be cut into tokens to know that they fit.
        pairs = enumerate(zip(texts, rooms, strict=True))
        long = [i for i, (text, room) in pairs if len(text.encode()) > room]
        found, less = list(texts), 0
        while long:
            cut = zip(long, self._ids([found[i] for i in long]), strict=True)
            over = {i: ids for i, ids in cut if len(ids) > rooms[i]}
            for i, ids in over.items():
                found[i] = self._decoded(ids[: max(0, rooms[i] - less)])
            # What was cut may be cut into other, more tokens.
            long, less = list(over), less + 1
        return found

    def _decoded(self, ids: Sequence[int]) -> str:
        """On one line, without a character of which the last token is but a part."""
        return " ".join(str(self.tokenizer.decode(ids)).rstrip("\ufffd").split())

    def texts(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """Laid-out prompts (B,)."""
        assert rows.target is not None
        items = [self.item_texts[i] for i in rows.target]
        return [self._whole(*pair) for pair in zip(self.user_texts(rows, skip), items, strict=True)]

    def _whole(self, user: str, item: str) -> str:
        return item + user if self.prompt.candidate_first else user + item

    def example_prompt(self) -> str:
        """A question about somebody of whom nothing is known."""
        user, item = self._frames
        known = self.prompt.history([]) if self.preferences is None else self.prompt.preference("")
        return self._whole(
            user.replace(USER, known), item.replace(CANDIDATE, self.prompt.candidate("X"))
        )

    def wording(self) -> str:
        """The prompt's words, and what is told of users."""
        known = self.shown if self.preferences is None else [self.preferences.digest]
        parts = [self.example_prompt(), known, self.max_length, self.prompt.candidate_first]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # Tokens --------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> PairTable:
        """The tokens of all parts."""
        limit = self.llm.max_length - self.answer_room()
        data = str(self.trainer.datamodule.prepared.digest)  # type: ignore[attr-defined]
        return PairTable(
            self.tokenizer, self.user_texts, self.item_texts, limit,
            f"{self.wording()} {self.llm.digest()} {data}", not self.llm.chat_template,
            self.prompt.candidate_first,
        )  # fmt: skip

    def collator(self, training: bool) -> Collator:
        """Id batches with tokens, see ``PairCollator``."""
        return PairCollator(
            HistoryCollator(self.max_length), self.table, self.answer_tokens,
            self.loss if training else None, self.tokenizer.pad_token_id,
        )  # fmt: skip

    # Evaluation ----------------------------------------------------------------------------------------

    @property
    def shares_users(self) -> bool:
        """Whether a user's part is read once for all candidates."""
        possible = not self.prompt.candidate_first and not self.adapter.adds_tokens
        return possible and can_branch(self.model)

    def encode(self, batch: Batch) -> Any:
        """Margins (B,) of labelled rows; of ranked ones what candidates are asked about behind.

        Raises:
            ModelError: the model is spread over devices, which would read unlike numbers of candidates.
        """
        if batch.label is not None:
            return super().encode(batch)
        if self.is_sharded:
            raise ModelError(
                "launch.strategy=fsdp cannot rank candidates: test with launch.strategy=ddp"
            )
        assert batch.tokens is not None
        assert batch.token_mask is not None
        read = None
        if self.shares_users:
            read = ReadPrompts(self.model, batch.tokens, batch.token_mask)
        return Asked(batch, read)

    def score(self, state: Any, items: Tensor) -> Tensor:
        """Margins (B, C) of items (C,) or (B, C); -inf at padding."""
        if not isinstance(state, Asked):
            return super().score(state, items)
        asked = items.expand(len(state.batch), -1)  # (B, C)
        found = (
            self._side_by_side(state, asked)
            if state.read is not None
            else self._alone(state, asked)
        )
        return found.masked_fill(asked == 0, -torch.inf)

    def _side_by_side(self, state: Asked, items: Tensor) -> Tensor:
        """(B, C), all candidates of a row behind what was read of its user."""
        assert state.read is not None
        labels, pad = self.answer_tokens, self.tokenizer.pad_token_id
        branches = [
            [[*self.table.item_part(i).tolist(), *labels.shared] if i else [pad] for i in row]
            for row in items.tolist()
        ]
        logits = state.read.end_logits(branches, (labels.first, labels.second), pad)
        return logits[..., 0] - logits[..., 1]

    def _alone(self, state: Asked, items: Tensor) -> Tensor:
        """(B, C), a prompt for each row and candidate, as many at a time as there are rows."""
        batch = state.batch
        assert batch.tokens is not None
        assert batch.token_mask is not None
        users = [
            ids[real].cpu().numpy()
            for ids, real in zip(batch.tokens, batch.token_mask.bool(), strict=True)
        ]
        rows, columns = (items > 0).nonzero().unbind(1)
        prompts = [
            [*self.table.whole(users[row], int(items[row, column])), *self.answer_tokens.shared]
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
        found = torch.zeros(items.shape, device=items.device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), len(batch)):
            some = order[first : first + len(batch)]
            tokens, mask = pad_left([prompts[i] for i in some], self.tokenizer.pad_token_id)
            part = replace(batch, tokens=tokens.to(items.device), token_mask=mask.to(items.device))
            found[rows[some], columns[some]] = self.margins(part)
        return found
