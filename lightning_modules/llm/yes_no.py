"""A language model that is asked whether somebody would like an item, and answers with one margin.

Legend: B rows, L tokens, A answer tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from datamodules.types import Batch, Collator, Rows
from lightning_modules.base import RankingModule
from lightning_modules.calibration import Calibration
from lightning_modules.errors import ModelError
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.llm.label_scoring import (
    NO_LOSS,
    LabelTokens,
    SharedPrefix,
    answer_losses,
    label_tokens,
    last_logits,
    only_tokens,
    pad_left,
)
from lightning_modules.llm.masks import layer_windows
from lightning_modules.llm.prompt_tokens import PromptTable, RowTokens
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.tuning import LanguageModelModule

Loss = Literal["margin", "answer", "prompt"]
WORTH_SHARING = 8  # tokens that all prompts begin with


@dataclass(frozen=True)
class YesNoCollator:
    """Id batches with the tokens of their prompts.

    In training by ``answer`` or ``prompt`` the right label's tokens stand behind the prompt, and ``answers``
    (B, A) holds what each of the last A positions should say next.
    """

    history: HistoryCollator
    table: RowTokens
    labels: LabelTokens
    loss: Loss | None  # None: evaluation
    pad: int

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``target`` is the item asked about."""
        prompts = [ids.tolist() for ids in self.table.of(rows)]
        answers = None
        if self.loss in (None, "margin"):
            tokens, mask = pad_left([ids + list(self.labels.shared) for ids in prompts], self.pad)
        else:
            assert rows.label is not None
            ends = [list(self.labels.full[0 if liked else 1]) for liked in rows.label]
            read = [ids + end[:-1] for ids, end in zip(prompts, ends, strict=True)]
            tokens, mask = pad_left(read, self.pad)
            said = ends
            if self.loss == "prompt":  # every token but the first is foretold, as in TALLRec's code
                said = [ids[1:] + end for ids, end in zip(prompts, ends, strict=True)]
            answers, _ = pad_left(said, NO_LOSS)
        carries = np.ones(len(rows.row)) if rows.filler is None else ~rows.filler
        return replace(
            self.history(rows),
            tokens=tokens,
            token_mask=mask,
            answers=answers,
            weight=torch.from_numpy(carries.astype(np.float64)),
        )


class YesNoModule(LanguageModelModule, RankingModule):
    """Base of the methods that ask a language model for a yes or a no.

    Args:
        llm, adapter: see ``LanguageModelModule``.
        max_length: newest events that a prompt shows.
        loss: ``margin``, the binary cross-entropy of logit(yes) - logit(no); ``answer``, the language model's
            loss on the label's tokens; ``prompt``, on every token of prompt and label (TALLRec's code).
        options: of the training, see ``LanguageModelModule``.

    Raises:
        ValueError: an unknown loss.
    """

    labelled = True
    labels: tuple[str, str] = ("Yes.", "No.")

    def __init__(
        self,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        max_length: int = 10,
        loss: Loss = "margin",
        **options: Any,
    ) -> None:
        super().__init__(llm, adapter, max_length=max_length, **options)
        if loss not in get_args(Loss):
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(get_args(Loss))}")
        self.loss = loss
        self._prefix: SharedPrefix | None = None  # while an evaluation or a training step runs
        self._opening: list[int] = []  # what all prompts begin with, where training shares it
        self._answered: Tensor | None = None  # (B,) bool, of the rows that were evaluated last

    # What a method gives --------------------------------------------------------------------------

    @abstractmethod
    def texts(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """Prompts (B,) of rows without their ``skip`` (B,) oldest events, up to where the answer begins."""

    @abstractmethod
    def wording(self) -> str:
        """A digest of what prompts depend on besides rows and tokenizer: it names their tokens on disk."""

    # Tokens ------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> RowTokens:
        """The tokens of all prompts."""
        limit = self.llm.max_length - self.answer_room()
        data = str(self.trainer.datamodule.prepared.digest)  # type: ignore[attr-defined]
        name = f"{self.wording()} {self.llm.digest()} {data}"
        special = not self.llm.chat_template
        return PromptTable(self.tokenizer, self.texts, limit, name, special)

    @cached_property
    def answer_tokens(self) -> LabelTokens:
        """The two labels behind a prompt of this method."""
        special = not self.llm.chat_template
        return label_tokens(self.tokenizer, self.example_prompt(), self.labels, special)

    def answer_room(self) -> int:
        """Tokens that may stand behind a prompt: those of the longer label."""
        return max(len(full) for full in self.answer_tokens.full)

    @abstractmethod
    def example_prompt(self) -> str:
        """Any prompt as ``texts`` makes them."""

    def row_lengths(self, rows: Rows) -> np.ndarray:
        """(R,) tokens of each prompt; tokenises them all."""
        return self.table.add(rows)

    def collator(self, training: bool) -> Collator:
        """Id batches with tokens."""
        return YesNoCollator(
            HistoryCollator(self.max_length),
            self.table,
            self.answer_tokens,
            self.loss if training else None,
            self.tokenizer.pad_token_id,
        )

    # Training ------------------------------------------------------------------------------------------

    def margins(self, batch: Batch) -> Tensor:
        """logit(yes) - logit(no) (B,); without gradients also notes which rows a label would answer."""
        labels = self.answer_tokens
        answered: list[Tensor] | None = None if torch.is_grad_enabled() else []
        with only_tokens(self.model, (labels.first, labels.second), answered):
            yes, no = self._last_logits(batch, 1)[:, 0].unbind(-1)  # (B,) each
        self._answered = answered[0][:, 0] if answered else None
        return yes - no

    def _last_logits(self, batch: Batch, keep: int) -> Tensor:
        """(B, keep, V)."""
        assert batch.tokens is not None
        assert batch.token_mask is not None
        if self._prefix is not None:
            return self._prefix.last_logits(batch.tokens, batch.token_mask, keep)
        return last_logits(self.model, batch.tokens, batch.token_mask, keep)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The chosen loss summed over rows, over the rows of the whole global batch."""
        assert batch.normaliser is not None
        assert batch.weight is not None  # 0 at rows that only keep ranks in step
        if self._opening:
            self._prefix = SharedPrefix(self.model, self._opening)
        try:
            each = self._row_losses(batch)
        finally:
            self._prefix = None
        loss: Tensor = (each * batch.weight).sum() / batch.normaliser
        self.log_train_loss(loss)
        return loss

    def _row_losses(self, batch: Batch) -> Tensor:
        """(B,); of ``answer`` and ``prompt`` the mean over a row's tokens."""
        assert batch.label is not None
        if self.loss == "margin":
            return F.binary_cross_entropy_with_logits(
                self.margins(batch), batch.label.float(), reduction="none"
            )
        assert batch.answers is not None
        logits = self._last_logits(batch, batch.answers.shape[1])
        return answer_losses(logits, batch.answers)

    def on_train_start(self) -> None:
        """Find what all prompts begin with; neither recomputed activations nor split layers can share it.

        Of a split layer that runs twice before the backward pass, the first run would meet weights that the
        second has let go. The loss on the prompt needs what each position of its beginning says next.
        """
        whole = self.recomputes or self.is_sharded or self.loss == "prompt"
        self._opening = [] if whole else self._shared_opening()

    @property
    def shared_tokens(self) -> int:
        """Tokens that all prompts begin with, read once for all rows of a training step or an evaluation."""
        return len(self._opening) if self._prefix is None else self._prefix.length

    def remarks(self) -> list[str]:
        """What histories lost."""
        cut = self.table.cut_events
        told = f"{cut:,} of the histories' events did not fit into {self.table.limit} tokens"
        return [*super().remarks(), *([told] if cut else [])]

    # Evaluation ----------------------------------------------------------------------------------------

    def _reset(self, split: str) -> None:
        """Fresh sums, and what all prompts begin with is read."""
        super()._reset(split)
        if shared := self._shared_opening():
            with self.trainer.precision_plugin.forward_context():
                self._prefix = SharedPrefix(self.model, shared)

    def _shared_opening(self) -> list[int]:
        """Tokens that all prompts known so far begin with, if sharing them is possible and worth it."""
        possible = not self.adapter.adds_tokens and layer_windows(self.model) is not None
        shared = self.table.common_prefix() if possible else []
        return shared if len(shared) >= WORTH_SHARING else []

    def _log(self, split: str) -> dict[str, Tensor]:
        """Log, and forget the prefix: the weights will move."""
        self._prefix = None
        return super()._log(split)

    def label_metric(self) -> Metric | None:
        """Margins are log-odds: as probabilities they can be right or wrong. Refusals are counted, too.

        A row is refused if the model, writing greedily, would put another token than a label's where the
        two labels part; another spelling of a label is none. The same pass tells, of zero-shot, few-shot and
        tuned models alike.
        """
        return Calibration(refusals=True)

    def label_values(self, batch: Batch, scores: Tensor) -> tuple[Tensor, ...]:
        """Margins, labels, and whether each row was answered, (B,) each; of the batch encoded last."""
        assert self._answered is not None
        return *super().label_values(batch, scores), self._answered

    def encode(self, batch: Batch) -> Tensor:
        """The margins (B,): a prompt names its item, so that nothing is left to score."""
        return self.margins(batch)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """(B, 1), of the item that the prompt asks about."""
        if items.shape != (len(state), 1):
            raise ModelError(
                f"{type(self).__name__} scores the item that a prompt asks about, got {tuple(items.shape)}: "
                "give data.examples a recipe"
            )
        return state[:, None]
