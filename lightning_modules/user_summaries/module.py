"""``UserSummariesModule``: a frozen language model writes what a user likes, from the items of a history.

Legend: H histories, S steps (``blocks``), B steps of a batch, I items.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from torch import Tensor

from datamodules.types import NO_TITLE, ItemWords, Rows
from lightning_modules.errors import ModelError
from lightning_modules.generations import Generations
from lightning_modules.item_summaries.base import shortened
from lightning_modules.item_texts import Field, item_texts
from lightning_modules.llm.engines import Engine
from lightning_modules.llm.layouts import lay_out_shown
from lightning_modules.llm.sampling import Sampling
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.wording import as_data, capped, required_words
from lightning_modules.llm.writing import WritesTexts
from lightning_modules.predicting import PredictingModule
from lightning_modules.user_summaries.blocks import Cut, Join, Mode, Plan
from lightning_modules.user_summaries.prompts import DISLIKED, NotePrompts, WorkedNote

SplitName = Literal["train", "valid", "test"]
SCHEMA: dict[str, Any] = {
    "user": pl.Int64, "start": pl.Int64, "stop": pl.Int64, "text": pl.String,
    "steps": pl.List(pl.String), "left_out": pl.Int64, "empty": pl.Int64,
}  # fmt: skip


class UserSummariesModule(WritesTexts, PredictingModule):
    """MLLM-MSR's recurrent summaries (arXiv 2408.09698) and MLLM-SRec's windows (s41598-025-14251-1).

    Every history that a row of the data shows gets one text, whatever number of rows show it. A text is
    written when those that it reads are there: all users' k-th blocks are batched, so that the calls one
    after the other are the blocks of the longest history. Each device writes for users of its own.

    A prompt that does not fit loses its oldest items (of a merge, notes), which are counted. Where nothing is
    written, the text before it stays.

    Args:
        catalog, item_words, row_histories: given by the runner from the data.
        llm: it writes; nothing is trained.
        mode, block_size, window, step, join: how histories are cut, see ``blocks.Cut``.
        fields: of the catalogue, that an item's text is made of; ``summary`` is what another stage has
            written (``inputs: {catalog.summary: ...}``).
        splits: whose rows' histories; all that later stages read.
        max_length: newest events of a history that are read; None reads all.
        words: that a text should have, at most; the model is asked, not forced.
        about: what a text is about.
        examples: worked notes, which are shown before what is asked.
        item_tokens: of an item's text that are read, at most.
        max_new_tokens: of a text, at most; what is cut off ends with its last whole sentence.
        sampling: draws texts; None writes the likeliest tokens.
        engine: what runs the language model; None: transformers.

    Raises:
        ValueError: a limit is impossible, or the data do not say what their items are called, or the engine
            cannot run the language model.
    """

    written_by = "predict"

    def __init__(
        self,
        catalog: pl.DataFrame,
        item_words: ItemWords | None,
        row_histories: dict[str, Rows],
        llm: BackboneSpec,
        mode: Mode = "recurrent",
        block_size: int = 3,
        window: int = 5,
        step: int | None = None,
        join: Join = "carry",
        fields: Sequence[Field] = ("title",),
        splits: Sequence[SplitName] = get_args(SplitName),
        max_length: int | None = None,
        words: int = 60,
        about: str = "kinds, themes and style",
        examples: Sequence[WorkedNote] = (),
        item_tokens: int = 128,
        max_new_tokens: int = 96,
        sampling: Sampling | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(llm, AdapterSpec(method="none"))
        self.run_by(engine)
        limits = {
            "words": words, "item_tokens": item_tokens, "max_new_tokens": max_new_tokens,
            "max_length": 1 if max_length is None else max_length,
        }  # fmt: skip
        if wrong := [f"{name} is {value}" for name, value in limits.items() if value < 1]:
            raise ValueError(f"{', '.join(wrong)}, expected at least 1")
        if not splits or (unknown := set(splits) - set(row_histories)):
            told = ", ".join(sorted(unknown)) if splits else "nothing"
            raise ValueError(f"splits names {told}, expected some of {', '.join(row_histories)}")
        self.prompts = NotePrompts(required_words(item_words), words, about, tuple(examples))
        self.texts = [text or NO_TITLE for text in item_texts(catalog, fields)]  # (I,)
        self.item_tokens = item_tokens
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        parts = [row_histories[name] for name in splits]
        self.rows = parts[0]
        keys = np.concatenate([np.stack([r.user, r.start, r.stop], axis=1) for r in parts])
        self.keys = np.unique(keys, axis=0)  # (H, 3) user, start, stop
        user, start, stop = self.keys.T
        if max_length is not None:
            start = np.maximum(start, stop - max_length)
        cut = Cut(mode, block_size, window, step, join)
        spans = zip(start.tolist(), stop.tolist(), strict=True)
        self.plan = Plan.of(cut, user.tolist(), spans)
        self.generations = Generations()
        self._at_once = 32  # steps that are written together: the loader's, once it is known
        self._texts: dict[int, str] = {}  # what stands after each step that was made here
        self._left_out: dict[int, int] = {}  # items or notes that each step does not show
        self._empty: set[int] = set()
        self._cut_off: set[int] = set()

    @property
    def numbered(self) -> int:
        """S."""
        return len(self.plan.steps)

    @cached_property
    def _read(self) -> tuple[list[str], np.ndarray]:
        """(I + 1,) each item's text as it is read, and how many tokens it has; item 0 is padding."""
        shown, lengths = capped(self.texts, self.item_tokens, self.tokenizer)
        return ["", *shown], np.minimum([0, *lengths], self.item_tokens)

    def predict_batches(self, size: int, rank: int, world_size: int) -> list[list[int]]:
        """Waves of steps, see ``Plan.batches``."""
        self._at_once = size
        items = self.rows.histories.items
        total = np.concatenate(
            [[0], np.cumsum(self._read[1][items])]
        )  # (N + 1,) tokens before each
        lengths = [
            len(s.before) * self.max_new_tokens + int(total[s.stop] - total[s.start])
            for s in self.plan.steps
        ]
        return self.plan.batches(lengths, size, rank, world_size)

    def predict_step(self, batch: Tensor, batch_index: int = 0) -> None:
        """Write the texts of steps (B,), whose earlier steps are written."""
        self._make(batch.tolist())

    def _make(self, numbers: Sequence[int]) -> None:
        """Note what stands after each of some steps."""
        told = [number for number in numbers if self._has_something(number)]
        self._texts.update(dict.fromkeys(set(numbers) - set(told), ""))
        if told:
            self._write_about(told)

    def _has_something(self, number: int) -> bool:
        """Whether a step has items or notes to be about."""
        step = self.plan.steps[number]
        return not step.merges or any(self._texts[b] for b in step.before)

    def _write_about(self, numbers: Sequence[int]) -> None:
        asked = [self.prompt(number) for number in numbers]
        written = self.write(asked, self.max_new_tokens, sampling=self.sampling)
        said = []
        for number, tokens in zip(numbers, written, strict=True):
            whole = len(tokens) < self.max_new_tokens
            said.append(shortened(self.said(tokens), whole))
            if not whole:
                self._cut_off.add(number)
        for number, text in zip(numbers, as_data(said, self.tokenizer), strict=True):
            if not text:
                self._empty.add(number)
                before = self.plan.steps[number].before
                text = self._texts[before[-1]] if before else ""
            self._texts[number] = text

    def prompt(self, number: int) -> list[int]:
        """Tokens of what a step asks; it shows as many of its newest items as fit.

        Raises:
            ModelError: not even the newest one fits.
        """
        step = self.plan.steps[number]
        notes = [text for b in step.before if (text := self._texts[b])]
        entries = notes if step.merges else self._items(step.start, step.stop)
        before = "" if step.merges or not notes else notes[-1]

        def ids(skip: int) -> list[int]:
            return self._tokens(entries[skip:], before, step.merges)

        room = self.llm.max_length - self.max_new_tokens
        whole = ids(0)
        if len(whole) <= room:
            return whole
        last = max(len(entries) - 1, 0)
        skip = bisect.bisect_left(range(last), True, key=lambda s: len(ids(s)) <= room)
        least = ids(skip)
        if len(least) > room:
            raise ModelError(
                f"a prompt about one item has {len(least)} tokens, and with a text of {self.max_new_tokens} "
                f"it does not fit into llm.max_length={self.llm.max_length}: raise it, or lower item_tokens "
                "or max_new_tokens"
            )
        self._left_out[number] = skip
        return least

    def _items(self, start: int, stop: int) -> list[str]:
        """Items of a stretch of history as they are shown, oldest first."""
        rows, shown = self.rows, self._read[0]
        found = [shown[item] for item in rows.histories.items[start:stop]]
        if rows.liked_above is None:
            return found
        assert rows.histories.ratings is not None
        liked = rows.histories.ratings[start:stop] > rows.liked_above
        return [text if like else DISLIKED + text for text, like in zip(found, liked, strict=True)]

    def _tokens(self, entries: Sequence[str], before: str, merges: bool) -> list[int]:
        if merges:
            asked = self.prompts.merged(entries)
        elif before:
            asked = self.prompts.next_block(entries, before)
        else:
            asked = self.prompts.first(entries)
        laid_out = lay_out_shown(self.tokenizer, self.llm.chat_template, *asked)
        special = not self.llm.chat_template
        ids: list[int] = self.tokenizer(laid_out, add_special_tokens=special)["input_ids"]
        return ids

    def _make_the_rest(self) -> None:
        """What other devices have written is known by its prompt."""
        for wave in self.plan.in_waves():
            rest = [number for number in wave if number not in self._texts]
            for at in range(0, len(rest), self._at_once):
                self._make(rest[at : at + self._at_once])

    def table(self) -> pl.DataFrame:
        """A line for each history, ascending: ``user``, ``start`` and ``stop`` as in ``Rows``, ``text``.

        ``steps`` holds the text after each call, oldest first, so that the last one is ``text``. Without
        events or where nothing was written ``text`` is null. ``left_out`` counts items (of a merge, notes)
        that fitted into no prompt, ``empty`` the calls that wrote nothing.
        """
        self._make_the_rest()
        rows = []
        for key, chain in zip(self.keys.tolist(), self.plan.chains, strict=True):
            steps = [self._texts[number] for number in chain]
            left_out = sum(self._left_out.get(number, 0) for number in chain)
            empty = sum(number in self._empty for number in chain)
            text = (steps[-1] or None) if steps else None
            rows.append((*key, text, steps, left_out, empty))
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def remarks(self) -> list[str]:
        """What was written, and what was not."""
        steps, waves = self.numbered, self.plan.waves
        users = len(set(self.plan.owner))
        notes = [
            f"{len(self.keys):,} histories of {users:,} users in {steps:,} texts, at most {waves:,} one "
            "after the other"
        ]
        counted = (
            (len(self._cut_off), f"texts are cut off at {self.max_new_tokens} tokens"),
            (sum(self._left_out.values()), "items or notes did not fit into their prompts"),
            (len(self._empty), "texts are empty: what was written before them stays"),
            (sum(not chain for chain in self.plan.chains), "histories have no events and no text"),
        )
        notes += [f"{count:,} {what}" for count, what in counted if count]
        return [*super().remarks(), *notes]
