"""MLLM-SRec's four steps in one prompt: the model writes its reasons itself, and is asked behind them.

Legend: B rows, L tokens, A answer tokens, F tokens that are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch, Collator, Rows
from lightning_modules.generations import Generations
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.llm.label_scoring import (
    NO_LOSS,
    LabelTokens,
    answer_losses,
    label_tokens,
    margin,
    pad_left,
)
from lightning_modules.llm.prompt_tokens import prompts_of, tokens_behind
from lightning_modules.llm.row_pictures import OpenedPictures, RowPictures
from lightning_modules.llm.writing import WritesTexts
from lightning_modules.llm.yes_no import YesNoCollator
from lightning_modules.mllm_srec.module import MLLMSRecModule
from lightning_modules.mllm_srec.prompts import PREFERENCE


@dataclass(frozen=True)
class TaughtCollator(YesNoCollator):
    """Labelled rows with the lines that earlier stages would have written behind their prompts.

    ``answers`` (B, A) foretells these lines' tokens; the last of the A positions is where the labels part.
    """

    module: ReasonsInOneModule | None = None

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``target`` is the item asked about."""
        assert self.module is not None
        behind = self.module.taught(rows)
        opened = len(self.module.opening)
        prompts = [ids.tolist() for ids in self.table.of(rows)]
        batch = super().__call__(rows)
        read = [ids + said for ids, said in zip(prompts, behind, strict=True)]
        tokens, mask = pad_left(read, self.pad)
        answers, _ = pad_left([[*said[opened:], NO_LOSS] for said in behind], NO_LOSS)
        return replace(batch, tokens=tokens, token_mask=mask, answers=answers)


class ReasonsInOneModule(WritesTexts, MLLMSRecModule):
    """The chain of thought in one prompt: numbered lines on picture, item and user, label last.

    The history is listed as ``history`` says, not summarised. The response begins with the first line's
    heading; the model goes on, greedily. What it writes from the last line's number on is left out, the
    question is put again in its place, and the margin is read there: every row has an answer. Lines are those
    of ``chain``, and one about the user where ``preferences`` are given; without any the prompt is answered
    at once.

    A fit teaches it to write what the earlier stages wrote (``chain``'s columns, ``preferences``), and to
    answer behind that: the loss is the margin's plus the mean over the lines' tokens. The paper does not say
    how this is tuned. A test reads neither: all lines are the model's.

    Args:
        reasoning_tokens: of all lines, at most.
        options: see ``MLLMSRecModule``.

    Raises:
        ValueError: ``chain`` is None, another loss than the margin's, no token to write, or see
            ``MLLMSRecModule``.
    """

    def __init__(self, reasoning_tokens: int = 160, **options: Any) -> None:
        super().__init__(**options)
        if self.prompt.chain is None:
            raise ValueError("chain is null: name the steps, [picture, fusion] or [] for none")
        if self.loss != "margin":
            raise ValueError(
                f"loss is {self.loss!r}, but reasons are taught beside loss=margin alone"
            )
        if reasoning_tokens < 1:
            raise ValueError(f"reasoning_tokens is {reasoning_tokens}, expected at least 1")
        self.reasoning_tokens = reasoning_tokens
        preferred = self.preferences is not None
        self.prompt = replace(self.prompt, in_one=True, preferred=preferred)
        self.generations = Generations()

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """As any adapter's: what is taught was written before."""
        return MLLMSRecModule.untrainable(self, trainer)

    def on_validation_epoch_start(self) -> None:
        """What a fit's earlier weights wrote is forgotten."""
        super().on_validation_epoch_start()
        self.generations = Generations()

    # Words and tokens ----------------------------------------------------------------------------------

    @property
    def told_preferences(self) -> None:
        """None: the history is listed."""
        return None

    @property
    def writes(self) -> bool:
        """Whether there is any line to write."""
        return bool(self.prompt.written)

    @cached_property
    def opening(self) -> list[int]:
        """The tokens that every response begins with."""
        if not self.writes:
            return []
        (ids,) = tokens_behind(self.tokenizer, "\n", [self.prompt.opening()])
        return ids

    @cached_property
    def closing(self) -> list[int]:
        """The tokens between reasons and answer."""
        if not self.writes:
            return []
        asked = self.prompt.closing()
        ids: list[int] = self.tokenizer(asked, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def answer_tokens(self) -> LabelTokens:
        """The two labels behind a whole response."""
        said = self.prompt.response({}) + self.prompt.closing() if self.writes else ""
        special = not self.llm.chat_template
        return label_tokens(self.tokenizer, self.example_prompt() + said, self.labels, special)

    def answer_room(self) -> int:
        """A response's tokens."""
        label = max(map(len, self.answer_tokens.full))
        lines = self.reasoning_tokens if self.writes else 0
        return len(self.opening) + lines + len(self.closing) + label

    def taught(self, rows: Rows) -> list[list[int]]:
        """(B) tokens of responses as earlier stages would write them, up to where the labels part."""
        assert rows.target is not None
        about = [""] * len(rows.target)
        if self.preferences is not None:
            about = [self._preferred[i] for i in self.preferences.of(rows)]
        notes = [self.item_texts.of(item - 1) for item in rows.target.tolist()]
        pairs = zip(notes, about, strict=True)
        texts = [self.prompt.response({**own, PREFERENCE: user}) for own, user in pairs]
        lines = tokens_behind(self.tokenizer, "\n", texts)
        most, end = len(self.opening) + self.reasoning_tokens, self._end()
        return [[*ids[:most], *end] for ids in lines]

    @cached_property
    def _preferred(self) -> list[str]:
        """The preferences as a response tells them."""
        assert self.preferences is not None
        return self.as_lines([text or "" for text in self.preferences.texts])

    def _end(self) -> list[int]:
        """What stands between reasons and where the labels part."""
        return [*self.closing, *self.answer_tokens.shared]

    def collator(self, training: bool) -> Collator:
        """In training with what is taught; else prompts alone, to be gone on with."""
        if not self.writes:
            return super().collator(training)
        pad = self.tokenizer.pad_token_id
        labels = replace(self.answer_tokens, shared=())
        if training:
            history = HistoryCollator(self.max_length)
            return TaughtCollator(history, self.table, labels, self.loss, pad, self)
        return replace(super().collator(False), labels=labels)  # type: ignore[type-var]

    # Training ------------------------------------------------------------------------------------------

    def _row_losses(self, batch: Batch) -> Tensor:
        """(B,): of the answer, plus the mean over the lines' tokens."""
        if not self.writes:
            return super()._row_losses(batch)
        assert batch.answers is not None
        assert batch.label is not None
        logits = self._last_logits(batch, batch.answers.shape[1])  # (B, A, V)
        margins = margin(logits[:, -1], self.answer_tokens)
        answered = F.binary_cross_entropy_with_logits(
            margins, batch.label.float(), reduction="none"
        )
        return answered + answer_losses(logits, batch.answers)

    # Evaluation ----------------------------------------------------------------------------------------

    @property
    def shares_users(self) -> bool:
        """Not where each candidate has reasons of its own."""
        return not self.writes and super().shares_users

    def encode(self, batch: Batch) -> Any:
        """Margins (B,) behind each labelled row's own reasons; of ranked rows see ``completed``."""
        if batch.label is None or not self.writes:
            return super().encode(batch)
        assert batch.target is not None
        read = self.completed(prompts_of(batch), batch.target.tolist())
        tokens, mask = pad_left(read, self.tokenizer.pad_token_id)
        moved = batch.user.device
        return self.margins(replace(batch, tokens=tokens.to(moved), token_mask=mask.to(moved)))

    def completed(self, prompts: Sequence[list[int]], items: Sequence[int]) -> list[list[int]]:
        """Prompts (B,) about items (B,) with the model's reasons, up to where the labels part."""
        if not self.writes:
            return super().completed(prompts, items)
        opened = [[*prompt, *self.opening] for prompt in prompts]
        shown = None
        if self.shown is not None:
            pictured = [self._pictured([item]) for item in items]
            shown = RowPictures(self.reader, self._opened, pictured)
        with torch.no_grad():
            written = self.write(opened, self.reasoning_tokens, shown=shown)
        pairs = zip(opened, written, strict=True)
        return [[*asked, *self._reasons(ids), *self._end()] for asked, ids in pairs]

    @cached_property
    def _opened(self) -> OpenedPictures:
        assert self.shown is not None
        return OpenedPictures(self.shown)

    @cached_property
    def _marks(self) -> set[int]:
        """Tokens that are no text."""
        tokenizer = self.tokenizer
        return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def _reasons(self, tokens: list[int]) -> list[int]:
        """The tokens (F,) before the last line's, which begins with its number; of text alone.

        A token that ends a message, or stands for a picture, says nothing here, and would be taken for one.
        """
        tokens = [token for token in tokens if token not in self._marks]
        mark = self.prompt.last_line()
        if mark not in self.said(tokens):
            return tokens
        fewest = next(n for n in range(len(tokens) + 1) if mark in self.said(tokens[:n]))
        kept = self.said(tokens).index(mark)
        while fewest and len(self.said(tokens[:fewest])) > kept:
            fewest -= 1
        return tokens[:fewest]
