"""MLLM-MSR's recommender: a language model that knows a user's taste and is asked about a candidate.

Legend: B rows, C candidates, I items, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from datamodules.types import NO_TITLE, Batch, Collator, ItemImages, ItemWords, Rows
from lightning_modules.errors import ModelError
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.item_texts import Field, catalogue_texts, without_years
from lightning_modules.llm.branches import ReadPrompts, can_branch
from lightning_modules.llm.label_scoring import pad_left
from lightning_modules.llm.pictures import PictureReader
from lightning_modules.llm.seen_pictures import SeenPictures
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec, VisionSpec
from lightning_modules.llm.wording import required_words
from lightning_modules.llm.yes_no import YesNoModule
from lightning_modules.mllm_msr.pictures import Shown, ShownPictures
from lightning_modules.mllm_msr.preferences import Preferences
from lightning_modules.mllm_msr.prompts import CANDIDATE, USER, PairPrompt
from lightning_modules.mllm_msr.texts import Frames, ItemTexts, UserTexts
from lightning_modules.mllm_msr.tokens import ItemParts, PairCollator, PairTable
from lightning_modules.reranking import RerankingModule


@dataclass(frozen=True)
class Asked:
    """Ranked rows before any candidate: their users' parts, and what was read of them where it is shared."""

    batch: Batch  # with ``tokens`` and ``token_mask`` (B, L) of the users' parts
    read: ReadPrompts | None


class MLLMMSRModule(YesNoModule, RerankingModule):
    """Ye et al., "Harnessing Multimodal Large Language Models for Multimodal Sequential Recommendation", AAAI
    2025 (arXiv 2408.09698): the recommender, p = p(yes) / (p(yes) + p(no)) = sigmoid(margin).

    It learns from labelled rows, as every yes/no method, and scores any item of a ranked row by the margin
    behind a prompt about the user and this item. A user's part is read once for all candidates, which are
    then read in parallel behind it; with ``candidate_first``, as published, each prompt is read alone.

    Args:
        catalog, item_words, item_images: given by the runner from the data.
        llm, adapter: see ``YesNoModule``.
        preferences: the table of a stage that summarises users; None lists the newest titles instead.
        fields: of the catalogue, that are told of a candidate besides its title.
        candidate_first: show the candidate before the user.
        text_tokens: of a candidate's title and fields, at most.
        years: show the year that a film's title ends with.
        pictures: of candidates, ``own`` or none; or wrong ones, to learn what a finished model reads
            (``ShownPictures``). Image tokens count as tokens of a prompt.
        options: of the training, see ``YesNoModule``, and of a test of the whole catalogue, see
            ``RerankingModule``; without preferences ``max_length`` titles are shown.

    Raises:
        ValueError: data that do not say what their items are called; pictures that the data do not have, or
            that the language model does not read, or by a projector that nobody has trained; or see
            ``Preferences``.
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
        pictures: Shown = "none",
        item_images: ItemImages | None = None,
        **options: Any,
    ) -> None:
        super().__init__(llm, adapter, **options)
        if text_tokens < 1:
            raise ValueError(f"text_tokens is {text_tokens}, expected at least 1")
        if pictures not in get_args(Shown):
            raise ValueError(
                f"pictures is {pictures!r}, expected one of {', '.join(get_args(Shown))}"
            )
        if pictures != "none" and (not isinstance(llm, VisionSpec) or adapter.adds_tokens):
            raise ValueError(
                f"pictures={pictures} needs a language model that reads them, and an adapter that adds no "
                "tokens: take llm=smolvision and lora, or pictures=none"
            )
        if pictures != "none" and isinstance(llm, VisionSpec):
            llm.require_projector()
        self.shown = None if pictures == "none" else ShownPictures(item_images, pictures)
        self.seen: SeenPictures | None = None
        self.prompt = PairPrompt(required_words(item_words), candidate_first)
        self.preferences = None if preferences is None else Preferences(preferences)
        self.fields, self.text_tokens = tuple(fields), text_tokens
        titles = list(catalog["title"].fill_null(NO_TITLE))
        self.titles = titles if years else without_years(titles)  # (I,)
        self.details = catalogue_texts(catalog, self.fields, len(catalog)) if fields else []

    def sharded_strategy(self, devices: int) -> ShardedStrategy:
        """As any language model's, without pictures.

        Raises:
            ValueError: with pictures: ranks look at unlike numbers of them, and split layers run on all or
                none.
        """
        if self.shown is not None:
            raise ValueError(
                "a tower that looks at pictures cannot be spread over devices: take launch.strategy=ddp, or "
                "pictures=none"
            )
        return super().sharded_strategy(devices)

    def add_parts(self, device: torch.device, seed: int) -> None:
        """What the model's frozen tower sees of candidates."""
        if self.shown is not None:
            self.seen = SeenPictures(self.model, self.reader, self.shown.picture)

    ranks_candidates = scores_new_items = True

    @property
    def reads_summaries(self) -> bool:
        """Whether an earlier stage has summarised users."""
        return self.preferences is not None

    def summaries(self, rows: Rows) -> list[str | None] | None:
        """(B,) what the prompts tell of the rows' users."""
        known = self.preferences
        return None if known is None else [known.texts[i] for i in known.of(rows)]

    @cached_property
    def reader(self) -> PictureReader:
        """It knows the model's image tokens."""
        assert isinstance(self.llm, VisionSpec)
        return PictureReader(self.llm, self.tokenizer)

    # Words ---------------------------------------------------------------------------------------------

    @cached_property
    def frames(self) -> Frames:
        """What stands around the parts."""
        return Frames.of(self.prompt, self.tokenizer, self.llm.chat_template)

    @cached_property
    def item_texts(self) -> ItemTexts:
        """The items' parts of prompts."""
        return ItemTexts(
            self.frames, self.prompt, self.tokenizer, self.titles, self.details, self.text_tokens,
            None if self.shown is None else self.shown.mask,
        )  # fmt: skip

    @cached_property
    def user_texts(self) -> UserTexts:
        """The users' parts of prompts; they may have what the longest item's part leaves."""
        room = self.llm.max_length - self.answer_room() - int(self.items.lengths.max())
        return UserTexts(
            self.frames, self.prompt, self.tokenizer, self.item_texts.titles, self.preferences, room,
            self.max_length,
        )  # fmt: skip

    def texts(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """Laid-out prompts (B,)."""
        assert rows.target is not None
        items = [self.item_texts.parts[i] for i in rows.target]
        pairs = zip(self.user_texts(rows, skip), items, strict=True)
        return [self.frames.whole(*pair) for pair in pairs]

    def example_prompt(self) -> str:
        """A question about somebody of whom nothing is known."""
        user = self.frames.user.replace(USER, self.prompt.preference(""))
        item = self.frames.item.replace(CANDIDATE, self.prompt.candidate("X"))
        return self.frames.whole(user, item)

    def wording(self) -> str:
        """The prompt's words, and what is told of users."""
        titles = self.item_texts.titles
        known = titles if self.preferences is None else [self.preferences.digest]
        told = [self.prompt.preference(text) for text in ("", "X Y")]
        told += [self.prompt.history(titles) for titles in ([], ["X"], ["X", "Y", "Z"])]
        parts = [self.example_prompt(), told, known, self.max_length]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # Tokens --------------------------------------------------------------------------------------------

    @cached_property
    def items(self) -> ItemParts:
        """The tokens of items' parts."""
        special, texts, image = not self.llm.chat_template, self.item_texts.parts, None
        if self.shown is not None:
            texts = self.shown.expanded(texts, self.reader)
            image = int(self.reader.processor.config.image_token_id)
        return ItemParts(self.tokenizer, texts, special, self.prompt.candidate_first, image)

    @cached_property
    def table(self) -> PairTable:
        """The tokens of all prompts."""
        data = str(self.trainer.datamodule.prepared.digest)  # type: ignore[attr-defined]
        name = f"{self.wording()} {self.llm.digest()} {data}"
        special = not self.llm.chat_template
        users = self.user_texts
        return PairTable(self.tokenizer, users, self.items, users.room, name, special)

    def collator(self, training: bool) -> Collator:
        """Id batches with tokens, see ``PairCollator``."""
        return PairCollator(
            HistoryCollator(self.max_length), self.table, self.answer_tokens,
            self.loss if training else None, self.tokenizer.pad_token_id,
        )  # fmt: skip

    def remarks(self) -> list[str]:
        """What preferences lost, and candidates without a picture."""
        without = 0 if self.shown is None else int((~self.shown.mask[1:]).sum())
        cut = (self.user_texts.cut, "preferences lost their last words, which did not fit")
        counted = (cut, (without, "items have no picture and are asked about without one"))
        return [*super().remarks(), *(f"{count:,} {what}" for count, what in counted if count)]

    # Pictures ------------------------------------------------------------------------------------------

    def _shared_opening(self) -> list[int]:
        """None where image tokens have places of their own kind."""
        apart = self.seen is not None and not self.seen.in_line
        return [] if apart else super()._shared_opening()

    def _last_logits(self, batch: Batch, keep: int) -> Tensor:
        """With the pictures of the items asked about."""
        if self.seen is None:
            return super()._last_logits(batch, keep)
        assert batch.target is not None
        assert batch.tokens is not None
        assert batch.token_mask is not None
        items = self._pictured(batch.target.tolist())
        if self._prefix is not None:
            beside = self.seen.beside(items)
            return self._prefix.last_logits(batch.tokens, batch.token_mask, keep, **beside)
        return self.seen.last_logits(batch.tokens, batch.token_mask, items, keep)

    def _pictured(self, items: Sequence[int]) -> list[int]:
        """Those that are shown with a picture."""
        assert self.shown is not None
        return [item for item in items if self.shown.mask[item]]

    # Evaluation ----------------------------------------------------------------------------------------

    @property
    def shares_users(self) -> bool:
        """Whether a user's part is read once for all candidates."""
        behind = not self.prompt.candidate_first and not self.adapter.adds_tokens
        return behind and can_branch(self.model)

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
        parts = (batch.tokens, batch.token_mask, self._prefix)
        return Asked(batch, ReadPrompts(self.model, *parts) if self.shares_users else None)

    def score(self, state: Any, items: Tensor) -> Tensor:
        """Margins (B, C) of items (C,) or (B, C); -inf at padding."""
        if not isinstance(state, Asked):
            return super().score(state, items)
        asked = items.expand(len(state.batch), -1)  # (B, C)
        side_by_side = state.read is not None
        found = self._side_by_side(state, asked) if side_by_side else self._alone(state, asked)
        return found.masked_fill(asked == 0, -torch.inf)

    def _side_by_side(self, state: Asked, items: Tensor) -> Tensor:
        """(B, C), all candidates of a row behind what was read of its user."""
        assert state.read is not None
        asked = items.tolist()
        labels, pad = self.answer_tokens, self.tokenizer.pad_token_id
        branches = [
            [[*self.items.of(i).tolist(), *labels.shared] if i else [pad] for i in row]
            for row in asked
        ]
        seen = self.seen

        def beside(shown: list[tuple[int, int]]) -> dict[str, Any]:
            assert seen is not None
            return seen.beside(self._pictured([asked[row][branch] for row, branch in shown]))

        logits = state.read.end_logits(
            branches, (labels.first, labels.second), pad, beside=None if seen is None else beside
        )
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
            self.table.whole(users[row], int(items[row, column])).tolist()
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
        found = torch.zeros(items.shape, device=items.device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), len(batch)):
            some = order[first : first + len(batch)]
            asked = items[rows[some], columns[some]]
            read = self.completed([prompts[i] for i in some], asked.tolist())
            tokens, mask = pad_left(read, self.tokenizer.pad_token_id)
            moved = (tokens.to(items.device), mask.to(items.device))
            part = replace(batch, tokens=moved[0], token_mask=moved[1], target=asked)
            found[rows[some], columns[some]] = self.margins(part)
        return found

    def completed(self, prompts: Sequence[list[int]], items: Sequence[int]) -> list[list[int]]:
        """Prompts (B,) about items (B,) up to where the two labels part."""
        return [[*prompt, *self.answer_tokens.shared] for prompt in prompts]
