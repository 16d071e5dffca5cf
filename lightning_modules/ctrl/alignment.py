"""CTRL's first stage: SASRec's states learn what the texts of a history say.

Legend: B rows, T history length, I items; widths: d of collaborative vectors, t of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import polars
import torch
from torch import Tensor

from datamodules.types import Batch, Collator, Histories
from lightning_modules.ctrl.model import Alignment, contrast
from lightning_modules.id_batches import OneTargetCollator
from lightning_modules.item_text_similarity.model import mean_text
from lightning_modules.item_texts import Field, catalogue_texts, without_texts
from lightning_modules.llm.specs import SentenceEncoderSpec
from lightning_modules.llm.text_encoder import ItemTextEncoder
from lightning_modules.sasrec import SASRecModule
from lightning_modules.stage_module import mix_seeds

_ALIGNMENT = 511  # stream of random numbers


class CTRLAlignmentModule(SASRecModule):
    """Contrast of a history's state with its text (CTRL, arXiv 2306.02841), the way that A-LLMRec uses it.

    A-LLMRec's code writes a text of every prefix of every history and encodes it, which is quadratic in the
    length of a history. Here the text of a prefix is the mean of its items' sentence vectors, which are
    computed once, and each user gives one prefix an epoch, drawn at random. Items without a text are left out
    of the mean, prefixes without any out of the loss. No score is learned: the second stage does that.

    Rows are contrasted with those of their batch, so none may be spread over devices or micro batches.

    Args:
        num_items, catalog: given by the runner from the data.
        encoder: of the items' texts, frozen.
        fields: what is read of an item.
        subspaces: M (A-LLMRec's code: 3).
        group_size: rows that are contrasted with one another (A-LLMRec's code: 32).
        options: of the network and the training, see ``SASRecModule``.

    Raises:
        ValueError: a setting that cannot work.
    """

    newest_target = True
    reads_rows = False

    def __init__(
        self,
        num_items: int,
        catalog: polars.DataFrame,
        encoder: SentenceEncoderSpec | None = None,
        fields: Sequence[Field] = ("title", "description"),
        subspaces: int = 3,
        group_size: int = 32,
        **options: Any,
    ) -> None:
        if "loss" in options or options.get("windows", "newest") != "newest":
            raise ValueError(
                "the alignment has a loss and positions of its own: leave out loss and windows"
            )
        super().__init__(num_items, **options)
        if subspaces < 1 or group_size < 2:
            raise ValueError(
                f"subspaces must be at least 1 and group_size at least 2, got {subspaces} and {group_size}"
            )
        self.fields, self.subspaces, self.group_size = tuple(fields), subspaces, group_size
        texts = catalogue_texts(catalog, fields, num_items)  # (I,)
        self.texts = ItemTextEncoder(encoder or SentenceEncoderSpec(), texts, "none")
        self.alignment: Alignment | None = None

    # Life ----------------------------------------------------------------------------------------------

    def impossible(self, histories: Histories) -> str | None:
        """Text is needed."""
        return without_texts(bool(self.texts.told.any()), self.fields)

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """A batch has to be in one place."""
        if trainer.world_size > 1 or trainer.accumulate_grad_batches > 1:
            return (
                "CTRL's alignment contrasts the rows of a batch with one another: launch.devices=1 and "
                "launch.micro_batch_size=null"
            )
        return super().untrainable(trainer)

    def setup(self, stage: str) -> None:
        """Have the sentence vectors.

        Raises:
            DataSourceError: the encoder cannot be had or loaded.
        """
        if self.alignment is not None:
            return
        trainer: Any = self.trainer
        device = trainer.strategy.root_device
        width = self.texts.load(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seeds(trainer.datamodule.seed, _ALIGNMENT))
            made = Alignment(self.network.hidden_size, width, self.subspaces)
        self.alignment = made.to(device)
        self.take_weights()

    @property
    def has_parts(self) -> bool:
        """The layers that are as wide as the sentence vectors."""
        return self.alignment is not None

    # Training ------------------------------------------------------------------------------------------

    def collator(self, training: bool) -> Collator:
        """One prefix of each user's training events."""
        return OneTargetCollator(self.max_length) if training else super().collator(training=False)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The contrast, over the rows of the batch."""
        assert self.alignment is not None
        assert batch.targets is not None
        assert batch.normaliser is not None
        table, told = self.texts.table, self.texts.told
        text = mean_text(batch.history, batch.length, table, told, recency=1.0)  # (B, t)
        known = (batch.targets > 0).any(1) & told[batch.history].any(1)  # (B,)
        states = self.network.last(batch.history, batch.length)  # (B, d)
        ours, theirs = self.alignment(states[known], text[known].to(states.dtype))
        loss = contrast(ours, theirs, self.group_size) / batch.normaliser
        self.log_train_loss(loss)
        return loss
