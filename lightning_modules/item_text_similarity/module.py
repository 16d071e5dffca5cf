"""Text similarity as a row of a test: nothing is trained, items are encoded once in ``setup``.

Legend: B rows, C candidates, I items in the catalogue, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch, Histories
from lightning_modules.base import UntrainedModule
from lightning_modules.item_text_similarity.model import centred, mean_text
from lightning_modules.item_texts import Field, item_texts, without_texts
from lightning_modules.llm import SentenceEncoderSpec, encode_texts
from lightning_modules.next_item import dot_products


class ItemTextSimilarityModule(UntrainedModule):
    """What a frozen sentence encoder says alone: items are scored by their likeness to the history's texts.

    An item's score is the (weighted) mean of the cosines between its text and those of the history's items,
    computed as the dot product of the history's mean vector with the item's. Nothing is learned, so items
    and users without a training event are treated like all others. An item without any of ``fields`` has a
    zero vector: it says nothing in a history, and its score is 0, which is below nearly every item with a
    text, and with ``centre`` the score of an average one. A history that is empty, or of such items alone,
    ties all items.

    Args:
        catalog: the items' texts, given by the runner from the data; row i is item i + 1.
        encoder: which sentence encoder, see ``SentenceEncoderSpec``.
        fields: what is read of an item, in this order.
        recency: weight of an event relative to the one after it; 1 is the plain mean.
        max_length: newest events of a history that are read.
        centre: take the mean vector of all items out of each, which leaves what tells items apart.

    Raises:
        ValueError: no or repeated fields, or a ``recency`` outside (0, 1].
    """

    scores_new_items = True
    vectors: Tensor
    told: Tensor  # (I + 1,) bool, items with a text

    def __init__(
        self,
        catalog: pl.DataFrame,
        encoder: SentenceEncoderSpec,
        fields: Sequence[Field] = ("title", "categories"),
        recency: float = 1.0,
        max_length: int = 50,
        centre: bool = False,
    ) -> None:
        super().__init__(max_length)
        if not fields or len(set(fields)) < len(fields):
            raise ValueError(f"fields must name at least one field, each once, got {list(fields)}")
        if not 0 < recency <= 1:
            raise ValueError(f"recency must be above 0 and at most 1, got {recency}")
        self.texts = item_texts(catalog, fields)  # (I,)
        self.encoder, self.fields, self.recency = encoder, tuple(fields), recency
        self.centre = centre

    def impossible(self, histories: Histories) -> str | None:
        """Text is needed."""
        return without_texts(any(self.texts), self.fields)

    def setup(self, stage: str) -> None:
        """Encode the catalogue where the trainer computes, or read the vectors that an earlier run has kept.

        Raises:
            DataSourceError: the encoder cannot be had or loaded.
        """
        trainer: Any = self.trainer
        found = encode_texts(self.encoder, self.texts, trainer.strategy.root_device)  # (I, d)
        vectors = F.pad(torch.from_numpy(found), (0, 0, 1, 0))  # (I + 1, d)
        told = (vectors != 0).any(1).to(self.device)
        self.register_buffer("told", told, persistent=False)
        vectors = centred(vectors) if self.centre else vectors
        self.register_buffer("vectors", vectors.to(self.device), persistent=False)

    def user_vectors(self, batch: Batch) -> Tensor:
        """Mean text of each history, (B, d)."""
        return mean_text(batch.history, batch.length, self.vectors, self.told, self.recency)

    def item_vectors(self) -> Tensor:
        """Text vectors (I + 1, d); zero for padding and for items without text."""
        return self.vectors

    def encode(self, batch: Batch) -> Tensor:
        """User vectors (B, d)."""
        return self.user_vectors(batch)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Dot products (B, C)."""
        return dot_products(state, self.vectors[items])
