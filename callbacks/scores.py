"""Scored candidates: what every metric, slice and significance test can be recomputed from.

Sampled candidates: one Parquet line per (row, candidate). Whole catalogue: one line per row with its
best K items, the target's score, how many items are above it and how many are tied with it.
Labelled rows: one line per row.

Legend: B rows, C candidates, K best items, G groups.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import polars as pl

BUFFERED = 500_000  # scores held in memory before they are written


class ScoresWriter(lightning.Callback):
    """Writes what ``test_step`` returns; raw ids come from the trainer's data module.

    Every rank writes its own parts; the first one joins them, so that the file is whole or absent.

    Args:
        path: the Parquet file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.parts = self.path.with_suffix(".parts")
        self._frames: list[pl.DataFrame] = []
        self._held = self._written = 0

    def on_test_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Remove what a killed attempt left."""
        if trainer.is_global_zero:
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(parents=True)
        trainer.strategy.barrier()

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        *unused: Any,
    ) -> None:
        """Turn one scored batch into lines."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._frames.append(_lines_of(outputs, data))
        listed = outputs.scores if outputs.scores is not None else outputs.counts.top_items
        self._held += listed.numel()
        if self._held >= BUFFERED:
            self._flush(trainer)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Join the parts in row order."""
        self._flush(trainer)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            whole = self.path.with_name(f".{self.path.name}.part")
            joined = pl.scan_parquet(self.parts / "*.parquet").sort("row", maintain_order=True)
            joined.sink_parquet(whole)
            whole.replace(self.path)
            shutil.rmtree(self.parts)

    def _flush(self, trainer: lightning.Trainer) -> None:
        if self._frames:
            name = f"{trainer.global_rank:04d}-{self._written:06d}.parquet"
            pl.concat(self._frames).write_parquet(self.parts / name)
            self._frames, self._held, self._written = [], 0, self._written + 1


def _lines_of(outputs: Any, data: Any) -> pl.DataFrame:
    if outputs.counts is None:
        return _labelled(outputs, data)
    return _listed(outputs, data) if outputs.scores is not None else _ranked(outputs, data)


def _row_columns(batch: Any, data: Any) -> dict[str, Any]:
    """Columns that every line of a row carries, (B,) each."""
    groups = batch.groups.cpu().numpy()  # (B, G)
    # Of a sample some rows are there for their group's sake alone.
    everywhere = () if data.test_rows is not None else ("all",)
    return {
        "row": batch.row.cpu().numpy(),
        "user_id": data.raw_users(batch.user.cpu().numpy()),
        "weight": batch.weight.cpu().numpy(),
        **{name: groups[:, g] for g, name in enumerate(data.group_names) if name not in everywhere},
    }


def _listed(outputs: Any, data: Any) -> pl.DataFrame:
    """One line per (row, candidate)."""
    batch = outputs.batch
    candidates = batch.candidates.cpu().numpy()  # (B, C), 0 = padding
    real = candidates > 0
    owner = np.nonzero(real)[0]
    lines = pl.DataFrame(_row_columns(batch, data))[owner]
    target = (candidates == batch.target.cpu().numpy()[:, None])[real]
    return lines.with_columns(
        data.raw_items(candidates[real]),  # named item_id
        pl.Series("score", outputs.scores.float().cpu().numpy()[real]),
        pl.Series("is_target", target),
    )


def _labelled(outputs: Any, data: Any) -> pl.DataFrame:
    """One line per labelled row: the item asked about, its score, whether it was liked."""
    batch = outputs.batch
    return pl.DataFrame(_row_columns(batch, data)).with_columns(
        data.raw_items(batch.target.cpu().numpy()),  # named item_id
        pl.Series("score", outputs.scores[:, 0].float().cpu().numpy()),
        pl.Series("label", batch.label.cpu().numpy()),
    )


def _ranked(outputs: Any, data: Any) -> pl.DataFrame:
    """One line per row."""
    batch, counts = outputs.batch, outputs.counts
    top = counts.top_items.cpu().numpy()  # (B, K), 0 where fewer items can be ranked
    kept = (top > 0).sum(axis=1)
    names = data.raw_items(top[top > 0])  # named item_id
    scores = pl.Series("score", counts.top_scores.float().cpu().numpy()[top > 0])
    owner = pl.Series("owner", np.repeat(np.arange(len(kept)), kept))
    lists = (
        pl.DataFrame([owner, names, scores])
        .group_by("owner", maintain_order=True)
        .agg(pl.col("item_id").alias("top_items"), pl.col("score").alias("top_scores"))
    )
    return (
        pl.DataFrame(_row_columns(batch, data))
        .with_columns(
            data.raw_items(batch.target.cpu().numpy()).alias("target_id"),
            pl.Series("target_score", counts.target_score.float().cpu().numpy()),
            pl.Series("above", counts.above.cpu().numpy()),
            pl.Series("ties", counts.ties.cpu().numpy()),
            pl.Series("candidates", counts.count.cpu().numpy()),
        )
        .with_row_index("owner")
        .with_columns(pl.col("owner").cast(pl.Int64))
        .join(lists, on="owner", how="left", maintain_order="left")
        .drop("owner")
    )
