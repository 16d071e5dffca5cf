"""A language model that learns to follow instructions: supervised tuning before, or without, any other fit.

Legend: B rows, L tokens, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import InstructionRows, TokenBatch
from lightning_modules.llm.instruction_tokens import InstructionTokens
from lightning_modules.llm.label_scoring import NO_LOSS, last_logits, pad_left
from lightning_modules.llm.packing import pack, packed_logits, require_rows_apart
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.tuning import LanguageModelModule

logger = logging.getLogger(__name__)
Loss = Literal["answer", "prompt"]


@dataclass(frozen=True)
class InstructionCollator:
    """Rows as tokens (B, L) without the last, and what the last A positions should say next (B, A).

    With ``room`` rows are packed into sequences of so many tokens.
    """

    tokens: InstructionTokens
    loss: Loss
    pad: int
    room: float | None = None

    def __call__(self, rows: InstructionRows) -> TokenBatch:
        """Rows that are not left out."""
        read, said = [], []
        filler = np.zeros(len(rows.row), bool) if rows.filler is None else rows.filler
        for row, idle in zip(rows.row.tolist(), filler, strict=True):
            ids, prompt = self.tokens.of(row)
            first = (
                max(1, prompt) if self.loss == "answer" else 1
            )  # the first token follows nothing
            read.append(ids[:-1])
            said.append([NO_LOSS] * (len(ids) - first) if idle else ids[first:])
        if self.room is not None:
            return pack(read, said, self.room, self.pad, rows.normaliser)
        tokens, mask = pad_left(read, self.pad)
        answers, _ = pad_left(said, NO_LOSS)
        return TokenBatch(tokens, mask, answers, torch.tensor(rows.normaliser, dtype=torch.float32))


class InstructionModule(LanguageModelModule):
    """Instruction tuning (Taori et al., "Stanford Alpaca", 2023), TALLRec's first stage (arXiv 2305.00447).

    The loss of a step is the sum over the tokens of its whole global batch over their number, so that
    neither devices nor micro batches change it:
    ``max_Phi sum_t log P(y_t | x, y_<t)`` of answers y behind prompts x.

    Args:
        llm, adapter: see ``LanguageModelModule``; ``llm.max_length`` limits prompt and answer together.
        loss: ``answer``, on the answer's tokens and the one that ends it; ``prompt``, on every token but the
            first (``train_on_inputs`` in TALLRec's code and in Alpaca-LoRA's).
        packing: put rows of a micro batch one after the other into sequences of at most ``llm.max_length``
            tokens (one of any length for ``flash_attention_2``) in place of padding; it changes losses and
            gradients by rounding and the streams of dropout alone.
        options: of the training, see ``LanguageModelModule``.

    Raises:
        ValueError: an unknown loss, or packing behind vectors that an adapter puts before the text.
    """

    def __init__(
        self,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        loss: Loss = "answer",
        packing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(llm, adapter, **options)
        if loss not in get_args(Loss):
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(get_args(Loss))}")
        if packing and adapter.adds_tokens:
            raise ValueError(
                f"adapter {adapter.method} puts vectors before a sequence, which packed rows would share: "
                "set packing=false, or take lora"
            )
        self.loss, self.packing = loss, packing
        self._sums = torch.zeros(2, dtype=torch.float64)  # of a validation: losses, tokens

    @cached_property
    def tokens(self) -> InstructionTokens:
        """All rows of the trainer's data."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        name = f"{self.llm.digest()} {data.prepared.digest}"
        made = InstructionTokens(
            self.tokenizer, data.rows, name, self.llm.max_length, self.llm.chat_template
        )
        if (told := made.told()) and self.trainer.is_global_zero:
            logger.warning(told)
        return made

    def row_lengths(self, rows: InstructionRows) -> np.ndarray:
        """(R,) tokens of prompt and answer."""
        return self.tokens.lengths[rows.row]

    def target_counts(self, rows: InstructionRows) -> np.ndarray:
        """(R,) tokens that carry a loss; 0 where a row does not fit."""
        lengths = self.tokens.lengths[rows.row]
        prompts = self.tokens.prompts[rows.row] if self.loss == "answer" else 1
        return np.where(lengths > 0, lengths - np.maximum(prompts, 1), 0)

    def collator(self, training: bool) -> InstructionCollator:
        """The same in training and validation."""
        room = math.inf if self.llm.attention == "flash_attention_2" else self.llm.max_length
        pad = self.tokenizer.pad_token_id
        return InstructionCollator(self.tokens, self.loss, pad, room if self.packing else None)

    def summed_loss(self, batch: TokenBatch) -> Tensor:
        """() cross-entropy summed over all tokens that carry one."""
        logits = self._logits(batch)
        return F.cross_entropy(
            logits.flatten(0, 1), batch.answers.flatten(), reduction="sum", ignore_index=NO_LOSS
        )

    def _logits(self, batch: TokenBatch) -> Tensor:
        """(B, A, V)."""
        if batch.positions is None or batch.columns is None:
            return last_logits(self.model, batch.tokens, batch.token_mask, batch.answers.shape[1])
        return packed_logits(
            self.model, batch.tokens, batch.positions, batch.columns, self.llm.attention
        )

    def on_train_start(self) -> None:
        """Make sure that packed rows do not see one another.

        Raises:
            ValueError: they do in this language model.
        """
        if self.packing:
            with self.trainer.precision_plugin.forward_context():
                require_rows_apart(self.model, self.llm.attention)

    def training_step(self, batch: TokenBatch, batch_index: int) -> Tensor:
        """Summed over tokens, over the tokens of the whole global batch."""
        loss = self.summed_loss(batch) / batch.normaliser
        self.log_train_loss(loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Fresh sums for every pass."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: TokenBatch, batch_index: int) -> None:
        """Add up."""
        self._sums[0] += self.summed_loss(batch).double()
        self._sums[1] += (batch.answers != NO_LOSS).sum()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, the mean over all held-out tokens of all ranks."""
        loss, count = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self.log("val/loss", (loss / count).float(), rank_zero_only=False, sync_dist=False)
