"""Popularity-gated fusion: one row of a table, from the scores files of two others.

Legend: B rows, C candidates, R rows of the test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from datamodules.sources import DataSourceError
from datamodules.types import Batch
from lightning_modules.base import UntrainedModule
from lightning_modules.fusion.model import (
    EDGES,
    Gate,
    bin_names,
    bins_of,
    fit_gate,
    fit_temperature,
    log_softmax,
)
from lightning_modules.fusion.score_files import ScoredPair, read_pair, require_one_data_set


class FusionModule(UntrainedModule):
    """Two models' scores of the same candidates, the second's weight by how often a candidate was trained on.

    Each model's scores become log-probabilities over the row's candidates, with a temperature of its own.
    A candidate's fused score is sharpness * ((1 - w) first + w second) + offset, with the weight w and the
    offset (a prior) of the bin of the candidate's own training count. The target is one of the candidates and
    treated as they are: a weight by the target's count would tell which one it is. (A weight by the user's
    count could not tell cold candidates from warm ones within a row, which is what the two models differ in.)
    Temperatures, sharpness, weights and offsets minimise the negative log-likelihood of the validation
    targets; of a sample of validation rows those count that were drawn at random. Nothing of the test is read
    but its candidates.

    Any two ranking methods that were tested on 1 + K candidates can be fused. What was chosen is in
    metrics.json: ``gate/temperature_first``, ``gate/temperature_second``, ``gate/sharpness``,
    ``gate/weight@N`` and ``gate/offset@N``, N being the least training count of a bin.

    Args:
        catalog: given by the runner from the data; row i is item i + 1.
        first_valid, first_test: scores files of the first model (collaborative, say), on either split.
        second_valid, second_test: of the second model (a language model, say).
        edges: least training count of each bin, ascending from 0.
        smoothness: how much neighbouring bins are held together, see ``fit_gate``.
        offsets: False leaves the prior out, so that the weights have to stand in for it.

    Raises:
        ValueError: see ``read_pair`` and ``require_one_data_set``; edges that do not ascend from 0, or a
            negative smoothness.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        first_valid: str,
        first_test: str,
        second_valid: str,
        second_test: str,
        edges: Sequence[int] = EDGES,
        smoothness: float = 1.0,
        offsets: bool = True,
    ) -> None:
        super().__init__()
        bins_of(np.zeros(0), edges)
        if smoothness < 0:
            raise ValueError(f"smoothness must be at least 0, got {smoothness}")
        self.valid = read_pair(first_valid, second_valid, catalog)
        self.test = read_pair(first_test, second_test, catalog)
        require_one_data_set(self.valid, self.test)
        self.edges, self.smoothness, self.offsets = tuple(edges), smoothness, offsets
        self.temperatures = (1.0, 1.0)
        self.gate: Gate | None = None
        self.fused = np.zeros(self.test.items.shape, np.float32)  # (R, C)

    def setup(self, stage: str) -> None:
        """Choose on validation, and fuse the test's scores."""
        bins = bins_of(self.histories.train_counts(), self.edges)  # (I + 1,)
        valid, keep = self.valid, self.valid.drawn
        real, target = valid.real[keep], valid.target[keep]
        first, second = (
            fit_temperature(scores[keep], real, target) for scores in (valid.first, valid.second)
        )
        self.temperatures = first, second
        first_log, second_log = (part[keep] for part in self._log_probabilities(valid))
        self.gate = fit_gate(
            first_log, second_log, bins[valid.items[keep]], real, target, len(self.edges),
            self.smoothness, self.offsets,
        )  # fmt: skip
        fused = self.gate(*self._log_probabilities(self.test), bins[self.test.items])
        self.fused = fused.astype(np.float32)

    def _log_probabilities(self, pair: ScoredPair) -> tuple[np.ndarray, np.ndarray]:
        """(R, C) of either model."""
        first, second = self.temperatures
        scaled = (pair.first / first, pair.second / second)
        return log_softmax(scaled[0], pair.real), log_softmax(scaled[1], pair.real)

    def encode(self, batch: Batch) -> np.ndarray:
        """Places (B,) of the batch's rows in the scores files.

        Raises:
            DataSourceError: they do not hold these rows.
        """
        row = batch.row.cpu().numpy()
        place = np.searchsorted(self.test.row, row).clip(max=len(self.test.row) - 1)
        if not np.array_equal(self.test.row[place], row):
            raise DataSourceError(_OTHER)
        return place

    def score(self, state: np.ndarray, items: Tensor) -> Tensor:
        """Fused scores (B, C) of the rows' candidates; padding has those of padding.

        Raises:
            DataSourceError: these are not the candidates that were scored.
        """
        asked = items.cpu().numpy()
        if asked.ndim != 2:
            raise DataSourceError(_OTHER)
        order = _behind(asked).argsort(axis=1)
        own, scored = np.take_along_axis(asked, order, axis=1), self.test.items[state]  # ascending
        width = scored.shape[1]
        if not np.array_equal(own[:, :width], scored) or own[:, width:].any():
            raise DataSourceError(_OTHER)
        found = np.zeros(asked.shape, np.float32)
        np.put_along_axis(found, order[:, :width], self.fused[state], axis=1)
        return torch.from_numpy(found).to(items.device)

    def remarks(self) -> list[str]:
        """The weights."""
        if self.gate is None:
            return []
        told = zip(bin_names(self.edges), self.gate.weights, strict=True)
        weights = ", ".join(f"{name}: {weight:.2f}" for name, weight in told)
        return [
            "weight of the second model by a candidate's training events, chosen on "
            f"{self.valid.drawn.sum():,} validation rows: {weights}"
        ]

    def _log(self, split: str) -> dict[str, Tensor]:
        """Also what was chosen on validation."""
        found = super()._log(split)
        if self.gate is None:
            return found
        told = dict(
            zip(("temperature_first", "temperature_second"), self.temperatures, strict=True)
        )
        told["sharpness"] = self.gate.sharpness
        told |= {f"weight@{e}": w for e, w in zip(self.edges, self.gate.weights, strict=True)}
        told |= {f"offset@{e}": o for e, o in zip(self.edges, self.gate.offsets, strict=True)}
        chosen = {f"gate/{n}": torch.tensor(v, dtype=torch.float64) for n, v in told.items()}
        return {**found, **chosen}


def _behind(items: np.ndarray) -> np.ndarray:
    """Items (B, C) with padding above all of them."""
    return np.where(items > 0, items, np.iinfo(items.dtype).max)


_OTHER = (
    "the scores files of the fusion do not hold the rows and candidates of its own data: give the stage the "
    "data, the split and the sample of rows of the tests that it reads"
)
