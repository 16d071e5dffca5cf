"""``RankingModule``: everything after ``score`` is written once, for every method.

Legend: B rows, C candidates or items of one block, I items, K best items kept in files.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from datamodules.types import VALID, Batch, Collator, Histories, Rows
from lightning_modules.generations import Generations
from lightning_modules.id_batches import HistoryCollator, TrainCollator
from lightning_modules.metrics import LogitAUC, RankingMetrics
from lightning_modules.ranking import RankCounts, rank_candidates, rank_catalogue
from lightning_modules.stage_module import StageModule

KS = (1, 3, 5, 10, 20)
TOP_K = 100  # best items of each row that a full-ranking test keeps in its scores file


def can_select(name: str) -> bool:
    """Whether a validation metric (``val/GROUP/METRIC``) is logged, so that an epoch can be chosen by it.

    All of group ``all`` and the main ones of the others: logging each costs as much as ranking many users.
    """
    _, group, metric = name.split("/")
    return group == "all" or metric in ("hit@10", "ndcg@10", "auc", "uauc")


@dataclass(frozen=True)
class ScoredBatch:
    """What a test step returns, for the callback that writes scored candidates."""

    batch: Batch
    counts: RankCounts | None  # None where rows are labelled: there is nothing to rank
    scores: Tensor | None  # (B, C) of ``batch.candidates``; None when the catalogue was ranked


@dataclass  # not frozen: Lightning moves its tensors to the CPU in place
class Best:
    """What a prediction step returns: each row's items, best first."""

    items: Tensor  # (B, K) int64; 0 where there are fewer
    scores: Tensor  # (B, K)
    reasons: list[str] | None = None  # (B,) why the first one, of a method that can say so
    row: Tensor | None = None  # (B,) which row of those asked about


class RankingModule(StageModule):
    """A method is a ``training_step``, an ``encode`` and a ``score``.

    Args:
        max_length: newest events of a history that the method reads.
        block_size: items scored at a time when the whole catalogue is ranked.
    """

    all_windows: bool = False
    sequential: bool = (
        True  # False: reads no history in training, so a user's first event is learned, too
    )
    num_negatives: int = 0
    labelled: bool = False
    newest_target: bool = False
    num_candidates: int = 0
    most_rows: dict[int, int] = {}  # noqa: RUF012 - of a class that has no limits; never changed
    generations: Generations | None = None  # of a method that writes texts; a callback keeps them
    reads_requests: bool = False  # whether ``request`` means anything
    request: str | None = None  # what a user asks for, in words; for predictions
    explains: bool = False  # whether predictions come with reasons, of a method that has them
    reads_histories: bool = True  # False: a user without an id means nothing to it
    ranks_candidates: bool = False  # of a labelled method: whether it ranks candidates, too
    scores_new_items: bool = False  # whether texts or pictures alone make an item, without training

    def __init__(self, max_length: int = 50, block_size: int = 16_384) -> None:
        super().__init__()
        if max_length < 1 or block_size < 1:
            raise ValueError(
                f"max_length and block_size must be at least 1, got {max_length} and {block_size}"
            )
        self.max_length = max_length
        self.block_size = block_size
        self.eval_metrics: dict[str, RankingMetrics] = {}
        self.pooled_auc: dict[str, LogitAUC] = {}  # by group; sampled candidates and labels
        self.label_metrics: dict[str, Metric] = {}  # by group; ``label_metric``
        self.results: dict[str, tuple[float, float]] = {}  # name -> (mean, standard error)

    # What a method gives -------------------------------------------------------------------------

    @abstractmethod
    def encode(self, batch: Batch) -> Any:
        """The state of each row, computed once: user vectors, say."""

    @abstractmethod
    def score(self, state: Any, items: Tensor) -> Tensor:
        """Scores (B, C) of ``items``, which are (C,) for all rows or (B, C)."""

    def impossible(self, histories: Histories) -> str | None:
        """Why this method means nothing on some data (it has no times, say); None where it can be run."""
        return None

    def label_metric(self) -> Metric | None:
        """What is measured of labelled rows besides AUC; None where scores are orders and nothing more."""
        return None

    def label_values(self, batch: Batch, scores: Tensor) -> tuple[Tensor, ...]:
        """What ``label_metric`` is updated with, (B,) each: of the rows' scores (B, 1) and labels."""
        assert batch.label is not None
        return scores[:, 0], batch.label

    @property
    def retriever(self) -> RankingModule | None:
        """The model among whose best items this one chooses; None where it ranks a catalogue by itself."""
        return None

    def reasons(self, batch: Batch, items: Tensor) -> list[str] | None:
        """(B,) why these items (B,) were chosen; None of a method that cannot say."""
        return None

    def summaries(self, rows: Rows) -> list[str | None] | None:
        """(B,) what an earlier stage has written of these histories; None of a method that reads no such."""
        return None

    @property
    def reads_summaries(self) -> bool:
        """Whether it reads ``summaries``, so that no other than held-out histories can be asked about."""
        return False

    # What the data module asks ---------------------------------------------------------------------

    def collator(self, training: bool) -> Collator:
        """Id batches; methods that read text give their own."""
        return TrainCollator(self.max_length) if training else HistoryCollator(self.max_length)

    def row_lengths(self, rows: Rows) -> np.ndarray:
        """(R,) events that a row's batch pads to."""
        return np.minimum(rows.stop - rows.start, self.max_length)

    @property
    def histories(self) -> Histories:
        """The data that the trainer's data module holds."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        histories: Histories = data.histories
        return histories

    # Evaluation ------------------------------------------------------------------------------------

    def rank(self, batch: Batch, top_k: int = 0) -> tuple[RankCounts | None, Tensor | None]:
        """Where the targets stand, among the batch's candidates or in the whole catalogue.

        Returns:
            The counts, and the candidates' scores (B, C) where there are candidates. Rows that are labelled
            have no counts, and scores (B, 1) of their target.
        """
        assert batch.target is not None
        state = self.encode(batch)
        if batch.label is not None:
            return None, self.score(state, batch.target[:, None])
        if batch.candidates is not None:
            scores = self.score(state, batch.candidates)  # (B, C)
            counts = rank_candidates(scores, candidates=batch.candidates, target=batch.target)
            return counts, scores
        counts = rank_catalogue(
            lambda items: self.score(state, items),
            self.histories.num_items,
            batch.target,
            batch.seen,
            self.block_size,
            top_k,
        )
        return counts, None

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Count ranks; the metrics are computed at the epoch's end."""
        self._count("val", batch, *self.rank(batch))

    def test_step(self, batch: Batch, batch_index: int) -> ScoredBatch:  # type: ignore[override]
        """Count ranks and hand the scores to whoever writes them."""
        counts, scores = self.rank(batch, TOP_K)
        self._count("test", batch, counts, scores)
        return ScoredBatch(batch, counts, scores)

    def predict_step(self, batch: Batch, batch_index: int = 0) -> Best:
        """The best items of each row, of its candidates or of the whole catalogue without what was seen.

        Of labelled rows it is the item asked about.
        """
        if batch.label is not None:
            assert batch.target is not None
            items, scores = (
                batch.target[:, None],
                self.score(self.encode(batch), batch.target[:, None]),
            )
        elif batch.candidates is not None:
            scores = self.score(self.encode(batch), batch.candidates)  # (B, C)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            items = batch.candidates.gather(1, order)
        else:
            counts, _ = self.rank(batch, TOP_K)
            assert counts is not None
            assert counts.top_items is not None
            assert counts.top_scores is not None
            items, scores = counts.top_items, counts.top_scores
        reasons = self.reasons(batch, items[:, 0]) if self.explains else None
        return Best(items, scores, reasons, batch.row)

    def on_validation_epoch_start(self) -> None:
        """Fresh sums for every pass."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Fresh sums for every pass."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log ``val/GROUP/METRIC``."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/GROUP/METRIC`` and keep the standard errors for the results file."""
        values = self._log("test")
        metrics = self.eval_metrics.get("test")
        if metrics:
            errors = metrics.stderr()
        else:
            found = ((group, auc.stderr()) for group, auc in self.pooled_auc.items())
            errors = {f"{g}/{name}": error for g, each in found for name, error in each.items()}
        self.results = {
            name: (value.item(), errors[name].item() if name in errors else float("nan"))
            for name, value in values.items()
        }

    def _reset(self, split: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        code = VALID if split == "val" else data.test_code
        names, labelled = data.group_names, data.labelled(code)
        self.eval_metrics.pop(split, None)
        if not labelled:
            self.eval_metrics[split] = RankingMetrics(KS, names).to(self.device)
        pooled = labelled or data.sampled_candidates(code)
        self.pooled_auc = {n: LogitAUC().to(self.device) for n in names} if pooled else {}
        made = {n: self.label_metric() for n in names} if labelled else {}
        self.label_metrics = {n: m.to(self.device) for n, m in made.items() if m is not None}

    def _count(
        self, split: str, batch: Batch, counts: RankCounts | None, scores: Tensor | None
    ) -> None:
        assert batch.groups is not None
        if counts is None:
            assert scores is not None
            self._count_labels(batch, scores)
            return
        if scores is not None and batch.candidates is not None and batch.target is not None:
            labels = batch.candidates == batch.target[:, None]  # (B, C)
            for member, auc in zip(batch.groups.T, self.pooled_auc.values(), strict=True):
                keep = (batch.candidates > 0) & member[:, None]
                auc.update(scores.flatten(), labels.flatten(), keep=keep.flatten())
        self.eval_metrics[split].update(
            counts.above, counts.ties, counts.count, batch.groups, batch.weight
        )

    def _count_labels(self, batch: Batch, scores: Tensor) -> None:
        assert batch.groups is not None
        assert batch.label is not None
        users = batch.user.double()
        for member, auc in zip(batch.groups.T, self.pooled_auc.values(), strict=True):
            auc.update(scores[:, 0], batch.label, users, keep=member)
        if self.label_metrics:
            values = self.label_values(batch, scores)
            for member, metric in zip(batch.groups.T, self.label_metrics.values(), strict=True):
                metric.update(*(v[member] for v in values))

    def _log(self, split: str) -> dict[str, Tensor]:
        metrics = self.eval_metrics.get(split)
        values = {**(metrics.compute() if metrics else {}), **self._pooled(metrics is None)}
        # The sums are already those of all ranks: every rank has the same numbers.
        logged = {f"{split}/{name}": v.float() for name, v in values.items()}
        if split == "val":
            chosen = {name: value for name, value in logged.items() if can_select(name)}
            self.log_dict(chosen, sync_dist=False, rank_zero_only=False)
        else:
            plain = {name: value.item() for name, value in logged.items()}
            for logger in self.loggers:
                logger.log_metrics(plain, step=self.global_step)
        return values

    def _pooled(self, labelled: bool) -> dict[str, Tensor]:
        """``group/auc``: all (score, label) pairs of all rows in one list, as TALLRec's tables have it.

        Labelled rows also give ``group/uauc``, the mean of the users' own AUCs, ``group/n``, the number
        of users who have both labels, and what ``label_metric`` measures.
        """
        found = {group: auc.compute() for group, auc in self.pooled_auc.items()}
        kept = ("auc", "uauc", "n", "users") if labelled else ("auc",)
        told = {f"{group}/{k}": v[k] for group, v in found.items() for k in kept if k in v}
        for group, metric in self.label_metrics.items():
            told |= {f"{group}/{k}": v for k, v in metric.compute().items()}
        return told


class UntrainedModule(RankingModule):
    """A row that is computed from the training data, not trained."""

    def configure_optimizers(self) -> Optimizer:
        """Refuse to be fitted.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} has nothing to train: use it in a `run: test` stage"
        )
