"""Whole catalogues ranked in two steps: one method retrieves some items of each row, another orders them.

A language model that is asked about each item in turn cannot be asked about a catalogue. What was not
retrieved keeps its place behind what was, in the order of the method that retrieved, so that a target has a
rank among all items and metrics are those of a full ranking.

Legend: B rows of a batch, R rows of a file, N items of a shortlist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from datamodules.types import Batch
from lightning_modules.errors import ModelError
from lightning_modules.ranking import RankCounts, require_no_nan

_COLUMNS = {"row", "target_id", "above", "ties", "candidates", "top_items"}


@dataclass(frozen=True)
class Shortlists:
    """What a full-ranking test left of each of its rows.

    Args:
        file: its name, for messages.
        place: row -> index into the others.
        target: (R,) internal ids.
        items: (R, N) internal ids, best first; 0 where a row had fewer.
        above, ties, count: (R,) where the target stood for the method that retrieved.
    """

    file: Path
    place: dict[int, int]
    target: np.ndarray
    items: np.ndarray
    above: np.ndarray
    ties: np.ndarray
    count: np.ndarray

    @classmethod
    def read(cls, file: str | Path, item_ids: pl.Series, most: int) -> Shortlists:
        """The first ``most`` items of each row of a scores file (``callbacks.scores``).

        Args:
            item_ids: (I,) raw ids; row i is the internal item i + 1.

        Raises:
            ModelError: the file is missing, damaged, of candidates that were drawn, of other items, or keeps
                fewer than ``most``.
        """
        path = Path(file)
        try:
            table = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise ModelError(
                f"{path} is no scores file that can be read: run its test again"
            ) from error
        if not set(table.columns) >= _COLUMNS:
            raise ModelError(
                f"{path} has no ranking of the whole catalogue: give its stage data: {{_target_: "
                'datamodules.whole_catalogue.whole_catalogue, data: "${data}"}'
            )
        kept = int(table["top_items"].list.len().max() or 0)  # type: ignore[arg-type]
        if most > kept and (table["candidates"] > kept).any():
            raise ModelError(
                f"shortlist_items is {most}, but {path} keeps the first {kept} items: ask for fewer"
            )
        number = pl.DataFrame({"id": item_ids, "item": np.arange(1, len(item_ids) + 1)})
        wanted = table.select(
            pl.col("row"), pl.col("top_items").list.head(most).alias("id")
        ).explode("id")
        found = wanted.drop_nulls().join(number, on="id", how="left", maintain_order="left")
        target = table.select(pl.col("target_id").alias("id")).join(
            number, on="id", how="left", maintain_order="left"
        )
        if found["item"].has_nulls() or target["item"].has_nulls():
            raise ModelError(f"{path} is of other items: let one experiment run both stages")
        lengths = table["top_items"].list.head(most).list.len().fill_null(0).to_numpy()
        items = np.zeros((table.height, int(lengths.max(initial=0))), np.int64)
        items[np.arange(items.shape[1]) < lengths[:, None]] = found["item"].to_numpy()
        told = (table[name].to_numpy() for name in ("above", "ties", "candidates"))
        place = {row: i for i, row in enumerate(table["row"].to_list())}
        return cls(path, place, target["item"].to_numpy(), items, *told)

    @property
    def retrieved(self) -> np.ndarray:
        """(R,) bool: whether the target is on its row's list."""
        return (self.items == self.target[:, None]).any(axis=1)

    def of(self, batch: Batch) -> tuple[np.ndarray, Tensor]:
        """Which rows of the file the batch's are (B,), and their items (B, N).

        Raises:
            ModelError: the file has other rows, or they had other targets.
        """
        assert batch.target is not None
        rows = batch.row.tolist()
        at = np.array([self.place.get(row, -1) for row in rows], dtype=np.int64)
        if (at < 0).any() or (self.target[at] != batch.target.cpu().numpy()).any():
            raise ModelError(
                f"{self.file} is of other rows than these: retrieve with the data and the split of this stage"
            )
        return at, torch.from_numpy(self.items[at]).to(batch.target.device)

    def counts(self, batch: Batch, at: np.ndarray, items: Tensor, scores: Tensor) -> RankCounts:
        """Where the targets stand among all items, the shortlist in the order of ``scores`` (B, N).

        Args:
            at, items: of ``of``.
        """
        assert batch.target is not None
        scores = scores.float().masked_fill(items == 0, -torch.inf)
        require_no_nan(scores.masked_fill(items == 0, 0.0))
        hit = items == batch.target[:, None]  # (B, N)
        listed = hit.any(dim=1)
        own = scores.masked_fill(~hit, -torch.inf).amax(dim=1)  # (B,)
        better = ((scores > own[:, None]) & (items > 0)).sum(1)
        equal = ((scores == own[:, None]) & (items > 0)).sum(1) - 1
        first, tied, count = (
            torch.from_numpy(each[at].astype(np.int64)).to(items.device)
            for each in (self.above, self.ties, self.count)
        )
        # Of items that tied with the target where the list ends, some stand on it.
        behind = torch.maximum(first, (items > 0).sum(1))
        left = (first + tied - behind).clamp(min=0)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return RankCounts(
            torch.where(listed, better, behind), torch.where(listed, equal, left), count, own,
            items.gather(1, order), scores.gather(1, order),
        )  # fmt: skip
