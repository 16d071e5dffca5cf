"""MoRec as a system: SASRec's network and losses, whose items are their texts.

Legend: B rows, T history length, I items, K negatives, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from datamodules.types import Batch, Histories
from lightning_modules.item_texts import Field, catalogue_texts, without_texts
from lightning_modules.llm.specs import SentenceEncoderSpec
from lightning_modules.llm.text_encoder import ItemTextEncoder, Trained
from lightning_modules.morec.model import Activation, TextItems
from lightning_modules.next_item import WITHOUT_NEGATIVES
from lightning_modules.sasrec import SASRecModule
from lightning_modules.stage_module import mix_seeds

_PROJECTION = 501  # stream of random numbers


class MoRecModule(SASRecModule):
    """Modality-based recommendation (Yuan et al., SIGIR 2023, arXiv 2303.13835): texts, no ids.

    ``encoder_trained=none`` is what A-LLMRec compares itself with: sentence vectors, computed once and kept,
    and a learned projection. Otherwise the text encoder is trained end to end: the distinct items of a batch
    are encoded once a step, the catalogue once an evaluation. A loss over the whole catalogue (``ce``) then
    encodes all of it in every step; ``sampled_ce`` with ``shared_negatives`` and ``popularity=1`` is the
    paper's debiased in-batch softmax, with a pool that does not depend on how a batch is spread over devices.

    Args:
        num_items, catalog: given by the runner from the data.
        encoder: of the items' texts.
        fields: what is read of an item; one without any of them is described at ``TextItems``.
        encoder_trained: ``none``, the ``last_layer`` or ``all``.
        encoder_learning_rate: peak learning rate of the text encoder (authors' code: 5e-5, the rest 1e-4).
        activation: after the projection, ``gelu`` (authors' code) or ``none``.
        chunk_size: texts encoded at a time.
        options: of the network and the training, see ``SASRecModule``.

    Raises:
        ValueError: a setting that cannot work.
    """

    scores_new_items = True
    reads_rows = False  # there is no table of ids

    def __init__(
        self,
        num_items: int,
        catalog: pl.DataFrame,
        encoder: SentenceEncoderSpec | None = None,
        fields: Sequence[Field] = ("title", "description"),
        encoder_trained: Trained = "none",
        encoder_learning_rate: float = 5e-5,
        activation: Activation = "gelu",
        chunk_size: int = 64,
        **options: Any,
    ) -> None:
        if options.get("tied") is False:
            raise ValueError("texts have no tied=false: there is no table of ids to score with")
        super().__init__(num_items, **options)
        if self.table_optimizer != "adamw":
            raise ValueError(
                f"table_optimizer={self.table_optimizer} is of tables, and texts have none: adamw"
            )
        if not encoder_learning_rate > 0:
            raise ValueError(f"encoder_learning_rate must be above 0, got {encoder_learning_rate}")
        texts = catalogue_texts(catalog, fields, num_items)  # (I,)
        reader = ItemTextEncoder(
            encoder or SentenceEncoderSpec(), texts, encoder_trained, chunk_size
        )
        self.fields, self.encoder_learning_rate = tuple(fields), encoder_learning_rate
        items: Any = TextItems(reader, self.network.hidden_size, activation)
        self.network.item_embedding = items

    @property
    def items(self) -> TextItems:
        """What stands where SASRec looks ids up."""
        items: Any = self.network.item_embedding
        assert isinstance(items, TextItems)
        return items

    # Life ----------------------------------------------------------------------------------------------

    def impossible(self, histories: Histories) -> str | None:
        """Text is needed."""
        return without_texts(bool(self.items.encoder.told.any()), self.fields)

    def setup(self, stage: str) -> None:
        """Load the text encoder, or the vectors that it has made.

        Raises:
            DataSourceError: the encoder cannot be had or loaded.
        """
        if self.items.projection is not None:
            return
        trainer: Any = self.trainer
        # Whoever holds this model as a frozen part has frozen it before these weights were there.
        frozen = not any(p.requires_grad for p in self.network.parameters())
        # Whether vectors were kept must not change what is drawn.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seeds(trainer.datamodule.seed, _PROJECTION))
            self.items.load(trainer.strategy.root_device)
        if frozen:
            self.items.requires_grad_(False)
        self.items.train(self.training)
        self.take_weights()

    @property
    def has_parts(self) -> bool:
        """The text encoder, and the projection that is as wide."""
        return self.items.projection is not None

    def remarks(self) -> list[str]:
        """How many items share one vector."""
        count = int((~self.items.encoder.told[1:]).sum())
        return [f"{count} of {self.num_items} items have no text and share one vector"] * (
            count > 0
        )

    # Training ------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """As in SASRec; what the step needs is encoded once, before it."""
        assert batch.targets is not None
        if self.loss in WITHOUT_NEGATIVES:
            needed = torch.arange(self.num_items + 1, device=batch.history.device)
        else:
            negatives = self._negatives(batch, batch.targets > 0)
            assert negatives is not None
            parts = (batch.history, batch.targets, negatives)
            needed = torch.cat([ids.flatten() for ids in parts])
        self.items.keep(self.items.rows(needed))
        try:
            return super().training_step(batch, batch_index)
        finally:
            self.items.forget()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Those of other models, with the text encoder's own learning rate."""
        texts = {id(p) for p in self.items.encoder.parameters()}
        groups = []
        for group in super()._parameter_groups():
            own = [p for p in group["params"] if id(p) not in texts]
            groups.append({**group, "params": own})
            if encoder := [p for p in group["params"] if id(p) in texts]:
                groups.append({**group, "params": encoder, "lr": self.encoder_learning_rate})
        return groups

    # Evaluation ----------------------------------------------------------------------------------------

    def _reset(self, split: str) -> None:
        """Encode the catalogue once for all batches, before anybody asks for the table."""
        self.items.keep(self.items.table())
        super()._reset(split)

    def _log(self, split: str) -> dict[str, Tensor]:
        """Log, and forget the table: the weights will move."""
        self.items.forget()
        return super()._log(split)
