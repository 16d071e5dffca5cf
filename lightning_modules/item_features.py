"""Item features of the catalogue (categories, brand) as vectors, and models whose items are ids and features.

A value of a column, "Drama" or a brand, is a feature. An item's feature vector is the mean of its features'
embeddings, and its input vector is made of that and of its id's embedding. ``FusedEmbedding`` stands where a
network has ``nn.Embedding``, so that SASRecF and GRU4RecF are their plain networks, unchanged.

Legend: I items, F features, P most features of one item, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.next_item import NextItemModule

Column = Literal["categories", "brand"]
Fusion = Literal["concat", "add"]
Tie = Literal["fused", "ids"]


def feature_bags(
    catalog: pl.DataFrame, columns: Sequence[Column], min_count: int
) -> tuple[Tensor, list[tuple[str, str]]]:
    """The features of each item.

    Args:
        catalog: columns as in ``CATALOG_SCHEMA``; row ``i`` is the item ``i + 1``.
        columns: where features are read; the same word in two columns is two features.
        min_count: items that must have a value; the others' values are left out.

    Returns:
        Feature ids (I + 1, P) int64, ascending, padded on the right with 0 (row 0 and items without
        features are all 0), and the (column, value) of the ids 1..F, sorted.
    """
    item = pl.int_range(1, pl.len() + 1).alias("item")
    parts = []
    for column in columns:
        part = catalog.select(item, pl.lit(column).alias("column"), pl.col(column).alias("value"))
        parts.append(part.explode("value") if part["value"].dtype == pl.List else part)
    found = pl.concat(parts).drop_nulls("value").unique()
    common = found.group_by("column", "value").len().filter(pl.col("len") >= min_count)
    vocabulary = common.sort("column", "value").with_row_index("feature", offset=1)
    pairs = found.join(vocabulary, on=["column", "value"]).sort("item", "feature")
    items = pairs["item"].to_numpy()
    counts = np.bincount(items, minlength=len(catalog) + 1)  # (I + 1,)
    place = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    bags = np.zeros((len(counts), counts.max()), dtype=np.int64)
    bags[items, place] = pairs["feature"].to_numpy()
    return torch.from_numpy(bags), vocabulary.select("column", "value").rows()


class ItemFeatures(nn.Module):
    """Feature vectors of items: the mean of the embeddings of what the catalogue says about them.

    Padding and items without features have zero vectors.

    Args:
        catalog, columns, min_count: see ``feature_bags``.
        width: d.
        init_std: standard deviation of the embeddings' normal initialisation.

    Raises:
        ValueError: an unknown column or ``min_count`` below 1, or no feature is left.
    """

    bags: Tensor

    def __init__(
        self,
        catalog: pl.DataFrame,
        width: int,
        columns: Sequence[Column] = get_args(Column),
        min_count: int = 2,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        unknown = [c for c in columns if c not in get_args(Column)]
        if unknown or not columns or min_count < 1:
            raise ValueError(
                f"columns must name some of {', '.join(get_args(Column))}, and min_count be at least 1, "
                f"got columns={list(columns)}, min_count={min_count}."
            )
        bags, self.vocabulary = feature_bags(catalog, columns, min_count)
        if not self.vocabulary:
            raise ValueError(
                f"The data has no item features: of its {len(catalog)} items no {min_count} share a value "
                f"of {' or '.join(columns)}. Name other columns, lower min_count={min_count}, or use the "
                "model without features."
            )
        self.register_buffer("bags", bags, persistent=False)  # (I + 1, P), made of the data again
        self.embedding = nn.Embedding(len(self.vocabulary) + 1, width, padding_idx=0)
        with torch.no_grad():
            self.embedding.weight.normal_(std=init_std)[0].zero_()

    def forward(self, items: Tensor) -> Tensor:
        """Feature vectors (*, d) of the ids ``items`` (*)."""
        bags = self.bags[items.flatten()]  # (N, P)
        means = F.embedding_bag(bags, self.embedding.weight, mode="mean", padding_idx=0)
        return means.unflatten(0, items.shape)


class FusedEmbedding(nn.Module):
    """Item vectors made of ids and features, to be used like the ``nn.Embedding`` of the ids alone.

    The fused vector of an item with id vector e and feature vector f is ``W [e; f]`` (``concat``, RecBole's
    SASRecF) or ``e + f`` (``add``). W has no bias: it would give all items' scores the same amount, and
    padding something else than zero.

    Args:
        ids: the embedding of the ids (I + 1, d), as its network has drawn it.
        features: of the same width and items.
        fusion: see above.
        tie: the table of the scores, ``weight``: ``fused``, so that an item of few events is known by its
            features, or ``ids``, where features are read in histories only (RecBole).

    Raises:
        ValueError: an unknown choice, or ``features`` are of other items.
    """

    def __init__(self, ids: nn.Embedding, features: ItemFeatures, fusion: Fusion, tie: Tie) -> None:
        super().__init__()
        if fusion not in get_args(Fusion) or tie not in get_args(Tie):
            raise ValueError(
                f"fusion must be one of {', '.join(get_args(Fusion))} and tie one of "
                f"{', '.join(get_args(Tie))}, got fusion={fusion!r}, tie={tie!r}."
            )
        if len(features.bags) != ids.num_embeddings:
            raise ValueError(
                f"The catalogue has {len(features.bags) - 1} items, but the model has "
                f"{ids.num_embeddings - 1}: both must be of the same data."
            )
        self.ids = ids
        self.features = features
        self.tie = tie
        width = ids.embedding_dim
        self.linear = nn.Linear(2 * width, width, bias=False) if fusion == "concat" else None
        if self.linear is not None:
            nn.init.xavier_normal_(self.linear.weight)
        self._kept: Tensor | None = None

    def _fuse(self, ids: Tensor, features: Tensor) -> Tensor:
        """(*, d) and (*, d) -> (*, d)."""
        if self.linear is None:
            return ids + features
        fused: Tensor = self.linear(torch.cat([ids, features], dim=-1))
        return fused

    def table(self) -> Tensor:
        """Fused vectors of all items (I + 1, d); row 0 is padding and zero."""
        if self._kept is not None:
            return self._kept
        every = torch.arange(self.ids.num_embeddings, device=self.ids.weight.device)
        return self._fuse(self.ids.weight, self.features(every))

    def forward(self, items: Tensor) -> Tensor:
        """Fused vectors (*, d) of the ids ``items`` (*), for the input of a network."""
        if self._kept is not None:
            return F.embedding(items, self._kept, padding_idx=0)
        return self._fuse(self.ids(items), self.features(items))

    @property
    def weight(self) -> Tensor:
        """The table (I + 1, d) that scores are made with, see ``tie``."""
        return self.table() if self.tie == "fused" else self.ids.weight

    def keep(self) -> None:
        """Make the table once for all uses until ``forget``; the weights must not change meanwhile."""
        self._kept = self.table()

    def forget(self) -> None:
        """Undo ``keep``."""
        self._kept = None


class FeatureModule(NextItemModule):
    """Item features for a next-item module whose network looks items up in ``network.item_embedding``.

    To be named before the module that it extends: ``class SASRecFModule(FeatureModule, SASRecModule)``.
    The fused table is made once a training step and once an evaluation. An item that was never trained on
    is known by its features (``tie=fused``); one without features is scored as in the plain model.

    Args:
        num_items, catalog: given by the runner from the data.
        fusion, tie: see ``FusedEmbedding``.
        columns, min_count: of the catalogue, see ``feature_bags``. By default a value that one item alone
            has is left out, since it says what its id says.
        options: of the plain module.

    Raises:
        ValueError: the catalogue has no features, or a setting cannot work.
    """

    network: Any

    def __init__(
        self,
        num_items: int,
        catalog: pl.DataFrame,
        fusion: Fusion = "concat",
        tie: Tie = "fused",
        columns: tuple[Column, ...] = get_args(Column),
        min_count: int = 2,
        **options: Any,
    ) -> None:
        if options.get("tied") is False:
            raise ValueError("item features have no tied=false: tie=ids scores with the ids' table")
        super().__init__(num_items, **options)
        self.reads_rows = False  # the fused table is made of all ids, not of some
        ids: nn.Embedding = self.network.item_embedding
        # Features start as large as ids, whatever the network's initialisation is.
        scale = ids.weight[1:].square().mean().sqrt().item()
        features = ItemFeatures(catalog, ids.embedding_dim, columns, min_count, scale)
        self.network.item_embedding = FusedEmbedding(ids, features, fusion, tie)

    @property
    def _items(self) -> FusedEmbedding:
        items: FusedEmbedding = self.network.item_embedding
        return items

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """As in the plain module; the whole table is made where the loss needs it anyway."""
        if self._items.tie == "fused":
            self._items.keep()
        try:
            return super().training_step(batch, batch_index)
        finally:
            self._items.forget()

    def _reset(self, split: str) -> None:
        """Fuse once for all batches, before anybody asks for the table."""
        self._items.keep()
        super()._reset(split)

    def _log(self, split: str) -> dict[str, Tensor]:
        """Log, and forget the table: the weights will move."""
        self._items.forget()
        return super()._log(split)
