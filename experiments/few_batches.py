"""Loaders of a few batches in place of a data module's own, and what the whole ones would hold.

Legend: R rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from datamodules.samplers import GlobalBatchSampler, RowBatch
from datamodules.stage_data import StageDataModule
from lightning_modules.llm.prompt_tokens import PromptTable, some_rows
from lightning_modules.stage_module import StageModule

STEPS, BATCHES = 6, 5  # optimizer steps of a fit, batches of everything else
SAMPLE = 512  # prompts that are cut into tokens as if they might have any length
BINS = 8


class FewBatches:
    """Replaces the data module's loaders by ones of a few batches, and notes what the whole ones hold."""

    def __init__(self, data: StageDataModule, module: StageModule) -> None:
        self.module = module
        self.whole: dict[str, int] = {}  # loader -> its batches
        self.rows: dict[str, dict[str, Any]] = {}  # loader -> lengths of its rows
        self.micro_batches = 1
        for name in ("train", "val", "test", "predict"):
            made = getattr(data, f"{name}_dataloader")
            setattr(
                data, f"{name}_dataloader", lambda made=made, name=name: self._few(made(), name)
            )

    def _few(self, loader: DataLoader[Any], name: str) -> DataLoader[Any]:
        sampler: Any = loader.sampler
        batches = list(sampler)
        self.whole[name] = len(batches)
        picked = batches[:BATCHES]
        if isinstance(sampler, GlobalBatchSampler):
            self.micro_batches = sampler.micro_batches
            picked = few_steps(batches, sampler)
            self.rows[name] = self._described(loader.dataset, len(sampler.lengths), sampler.lengths)
        elif hasattr(sampler, "rows"):  # longest first: others are taken evenly from the rest
            picked = [batches[i] for i in _evenly(len(batches), BATCHES)]
            self.rows[name] = self._described(loader.dataset, len(sampler.rows), None)
        return DataLoader(
            loader.dataset, batch_size=None, sampler=picked, collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )  # fmt: skip

    def _described(self, dataset: Any, count: int, lengths: np.ndarray | None) -> dict[str, Any]:
        """The rows' lengths, and the share of them that lost something."""
        rows = dataset[RowBatch.every(count)]
        if lengths is None:
            lengths = np.asarray(self.module.row_lengths(rows))  # type: ignore[operator]
        edges = np.linspace(lengths.min(), lengths.max() + 1, BINS + 1).round().astype(int)
        edges = np.unique(edges)
        counts, _ = np.histogram(lengths, edges)
        half, most, longest = np.quantile(lengths, [0.5, 0.95, 1.0], method="higher").tolist()
        return {
            "rows": count, "half": half, "most": most, "longest": longest,
            "edges": edges.tolist(), "counts": counts.tolist(), "cut": self._cut(rows, lengths),
        }  # fmt: skip

    def _cut(self, rows: Any, lengths: np.ndarray) -> float | None:
        """Share of rows that are shown without all of their history, or not at all; None where unknown."""
        if not hasattr(rows, "histories"):
            return float((lengths == 0).mean())
        most = getattr(self.module, "max_length", None)
        if most is None or most == 1:  # nobody asks a method of the last item for more
            return None
        first = rows.histories.offsets[rows.user]
        lost = rows.stop - first > most
        if rows.target is None and getattr(self.module, "all_windows", False):
            lost[:] = False  # older windows are rows of their own
        table = getattr(self.module, "table", None)
        if not isinstance(table, PromptTable):
            return float(lost.mean())
        keep = _evenly(len(rows.row), SAMPLE)
        asked = some_rows(rows, np.array(keep))
        texts = table.texts(asked, np.zeros(len(keep), np.int64))
        ids = table.tokenizer(texts, add_special_tokens=table.special_tokens)["input_ids"]
        return float((lost[keep] | np.array([len(i) > table.limit for i in ids])).mean())


def _evenly(count: int, most: int) -> list[int]:
    """Numbers below ``count``, the first among them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})


def few_steps(batches: list[RowBatch], sampler: GlobalBatchSampler) -> list[RowBatch]:
    """The micro batches of a few optimizer steps: the one that pads to most, then others."""
    each = sampler.micro_batches
    starts = range(0, len(batches), each)
    padded = [
        max(int(sampler.lengths[b.row].max()) * len(b.row) for b in batches[at : at + each])
        for at in starts
    ]
    longest = int(np.argmax(padded))
    others = [i for i in _evenly(len(padded), STEPS) if i != longest][: STEPS - 1]
    return [b for i in [longest, *others] for b in batches[i * each : (i + 1) * each]]
