"""``NextItemModule``: the training step, losses and optimizer that every id-sequence model shares.

Legend: B rows, T history length, N positions with a loss, d width, I items, K negatives.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from datamodules.types import Batch
from lightning_modules import losses, ranking_losses
from lightning_modules.base import RankingModule
from lightning_modules.length_groups import length_groups
from lightning_modules.loss_settings import Loss, refuse_settings
from lightning_modules.optimizers import TableAdamW
from lightning_modules.scalable_softmax import scalable_softmax
from lightning_modules.schedules import Schedule, learning_rate_share, scheduled
from lightning_modules.shared_negatives import draw_pool, log_probabilities
from lightning_modules.stage_module import mix_seeds

WITHOUT_NEGATIVES = ("ce", "scalable_ce")
TableOptimizer = Literal["adamw", "rowwise_adagrad"]
Windows = Literal["newest", "all"]


def dot_products(users: Tensor, items: Tensor) -> Tensor:
    """Scores (B, C) of ``users`` (B, d) with ``items``: (C, d) for all rows or (B, C, d)."""
    if items.ndim == 2:
        return users @ items.T
    return torch.einsum("bd,bcd->bc", users, items)


def newest(states: Tensor, length: Tensor) -> Tensor:
    """The state (B, d) of each row's newest item, out of ``states`` (B, T, d); zeros for an empty history."""
    rows = torch.arange(length.shape[0], device=length.device)
    picked = states[rows, (length - 1).clamp(min=0)]  # (B, d)
    return picked.masked_fill((length == 0)[:, None], 0)


class NextItemModule(RankingModule):
    """Predicts the next item at every position; scores are dot products with an item table.

    Args:
        num_items: I, given by the runner from the data.
        max_length: newest events that the model reads.
        windows: what of a long history is learned: ``all`` stretches of ``max_length`` targets, or the
            ``newest`` alone (as in the papers' code, which leaves the rest of the data unused).
        loss: ``ce`` over the whole catalogue (default; the choice of loss alone moves NDCG@10 on Amazon
            Beauty from 0.035 to 0.060, Klenitskiy & Vasilev, RecSys 2023), ``scalable_ce`` for catalogues
            of a million (``scalable_softmax``), ``sampled_ce`` with the log-Q correction, ``nce``, ``bce``
            (SASRec's own), ``gbce`` (gSASRec), ``bpr``, ``bpr_max`` and ``top1_max`` (GRU4Rec).
        negatives: sampled items a position, for every loss but the first two.
        shared_negatives: draw ``negatives`` items a step, for all positions: their scores are then one matrix
            product, so that thousands cost little. A user's own items are not left out, only the target is.
        popularity: draw shared negatives in proportion to training events to this power; 0 draws all alike.
            ``sampled_ce`` and ``nce`` correct for it (log-Q).
        scalable_items: items of a bucket of ``scalable_ce``; buckets and their positions are 2 sqrt(N).
        gbce_calibration: t of gBCE, 0..1.
        label_smoothing: of ``ce``.
        learning_rate, betas: of AdamW; the rate at its peak.
        weight_decay: decoupled, on matrices only.
        warmup: share of all steps over which the learning rate rises linearly.
        schedule: what follows the warm-up: ``constant``, or ``cosine`` or ``linear`` down to 0 at the
            last epoch (then the number of epochs is part of the recipe).
        block_size: items scored at a time when the whole catalogue is ranked.
        nce_log_partition: c of ``losses.nce``; None = log(I), right where all scores are 0.
        bpr_max_penalty: weight of BPR-max's score regularisation.
        table_optimizer: of the item and user tables: ``adamw``, or ``rowwise_adagrad`` for tables so large
            that their gradients and Adam's moments are the cost: see ``optimizers.TableAdamW``.
        table_learning_rate: peak learning rate of ``rowwise_adagrad``.
    """

    # Whether training reads the item table by rows only, through its ``nn.Embedding`` and ``loss_sum``. Its
    # gradient can then hold the rows of the batch alone.
    reads_rows = False
    reads_users = False  # whether a row's user has a vector of its own
    causal = True  # one pass gives the states before all events of a history

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        windows: Windows = "newest",
        loss: Loss = "ce",
        negatives: int = 1,
        gbce_calibration: float = 0.75,
        label_smoothing: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup: float = 0.0,
        schedule: Schedule = "constant",
        block_size: int = 16_384,
        bpr_max_penalty: float = 1.0,
        nce_log_partition: float | None = None,
        shared_negatives: bool = False,
        popularity: float = 0.0,
        scalable_items: int = 256,
        table_optimizer: TableOptimizer = "adamw",
        table_learning_rate: float = 0.05,
    ) -> None:
        super().__init__(max_length, block_size)
        sampled = loss not in WITHOUT_NEGATIVES
        if sampled and negatives < 1:
            raise ValueError(
                f"loss={loss} needs at least one sampled item, got negatives={negatives}"
            )
        refuse_settings(
            loss, label_smoothing, betas, learning_rate=learning_rate, warmup=warmup,
            gbce_calibration=gbce_calibration, bpr_max_penalty=bpr_max_penalty,
            scalable_items=scalable_items, table_learning_rate=table_learning_rate,
            weight_decay=weight_decay, popularity=popularity,
        )  # fmt: skip
        self.num_items = num_items
        self._table: Tensor | None = None  # of items, while an evaluation runs
        self.all_windows = windows == "all"
        self.loss = loss
        if shared_negatives and not sampled:
            raise ValueError(f"shared_negatives means nothing with loss={loss}, which samples none")
        if popularity and not shared_negatives:
            raise ValueError(
                f"popularity={popularity} is of shared negatives: set shared_negatives=true, too"
            )
        self.popularity = popularity
        self._log_q: Tensor | None = None  # (I + 1,)
        self.negatives_a_step = negatives if shared_negatives else 0
        self.num_negatives = negatives if sampled and not shared_negatives else 0
        self.scalable_items = scalable_items
        self.table_optimizer, self.table_learning_rate = table_optimizer, table_learning_rate
        self.gbce_calibration, self.bpr_max_penalty = gbce_calibration, bpr_max_penalty
        every = math.log(num_items)
        self.nce_log_partition = every if nce_log_partition is None else nce_log_partition
        self.label_smoothing = label_smoothing
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.schedule = warmup, schedule

    @abstractmethod
    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """Hidden states (N, d) at the positions ``where`` (B, T) is true, row after row."""

    @abstractmethod
    def user_vectors(self, batch: Batch) -> Tensor:
        """State after the newest item of each row, (B, d)."""

    @abstractmethod
    def item_vectors(self) -> Tensor:
        """Item table (I + 1, d); row 0 is padding."""

    def encode(self, batch: Batch) -> Tensor:
        """User vectors (B, d)."""
        return self.user_vectors(batch)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Dot products (B, C), at least float32: half precision would tie half of the rows' best items."""
        table = self.item_vectors() if self._table is None else self._table
        with torch.autocast(table.device.type, enabled=False):
            wide = torch.promote_types(torch.float32, table.dtype)
            return dot_products(state.to(wide), table[items].to(wide))

    def _reset(self, split: str) -> None:
        """Fresh sums, and the item table is made once for all batches and blocks."""
        super()._reset(split)
        self._table = self.item_vectors()

    def on_predict_epoch_start(self) -> None:
        """The item table is made once for all batches and blocks."""
        self._table = self.item_vectors()

    def on_predict_epoch_end(self) -> None:
        """Forget the table: the weights may move."""
        self._table = None

    def _log(self, split: str) -> dict[str, Tensor]:
        """Log, and forget the table: the weights will move."""
        self._table = None
        return super()._log(split)

    def compile_training(self) -> None:
        """Compile ``states`` for batches of any shape; the loss is matrix products, which gain nothing."""
        self.states = torch.compile(self.states, dynamic=True)  # type: ignore[method-assign]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss summed over real positions, over the count of the whole global batch."""
        assert batch.targets is not None
        assert batch.normaliser is not None
        where = batch.targets > 0  # (B, T)
        states = self._states_by_length(batch, where)
        total = self.loss_sum(states, batch.targets[where], self._negatives(batch, where))
        loss: Tensor = total / batch.normaliser
        self.log_train_loss(loss)
        return loss

    def _states_by_length(self, batch: Batch, where: Tensor) -> Tensor:
        """``states`` (N, d), made of groups of rows whose padding is cut off: a batch holds any lengths."""
        groups = length_groups(batch.length, where.shape[1])
        if len(groups) == 1:
            return self.states(batch, where)
        return torch.cat([
            self.states(batch.part(start, stop, width), where[start:stop, :width])
            for start, stop, width in groups
        ])  # fmt: skip

    def loss_sum(self, states: Tensor, targets: Tensor, negatives: Tensor | None) -> Tensor:
        """The chosen loss, summed: states (N, d), targets (N,), negatives (N, K) or None."""
        table = self.item_vectors()  # (I + 1, d)
        if self.loss == "scalable_ce":
            return scalable_softmax(states, table, targets, items=self.scalable_items)
        if negatives is None:
            return losses.chunked_softmax(
                states, table, targets, label_smoothing=self.label_smoothing,
                matmul_dtype=self._matmul_dtype(),
            )  # fmt: skip
        used = torch.arange(0)
        if self.sparse_gradients:
            table, targets, negatives, used = losses.rows_used(table, targets, negatives)
        if self.loss in ("sampled_ce", "nce"):
            log_q = self._log_probabilities(states.device)
            if self.sparse_gradients:
                log_q = log_q[used]
            if self.loss == "sampled_ce":
                return losses.sampled_softmax(states, table, targets, negatives, log_q)
            return losses.nce(
                states, table, targets, negatives, log_q, log_partition=self.nce_log_partition
            )
        if self.loss == "gbce":
            rate = min(1.0, negatives.shape[-1] / max(1, self.num_items - 1))
            return losses.gbce(
                states, table, targets, negatives, t=self.gbce_calibration, alpha=rate
            )
        if self.loss == "bpr_max":
            return ranking_losses.bpr_max(
                states, table, targets, negatives, penalty=self.bpr_max_penalty
            )
        plain = {"bce": losses.bce, "bpr": losses.bpr, "top1_max": ranking_losses.top1_max}
        return plain[self.loss](states, table, targets, negatives)

    @property
    def sparse_gradients(self) -> bool:
        """Whether the item table's gradient holds the rows of the batch alone."""
        by_rows = self.reads_rows and self.loss not in WITHOUT_NEGATIVES
        return by_rows and self.table_optimizer == "rowwise_adagrad"

    def embedding_tables(self) -> list[nn.Parameter]:
        """Item and user tables: trained matrices with a row for each."""
        users = getattr(self, "num_users", None)
        # Padding is a row; BERT4Rec's [MASK] is another; LightGCN has users and items in one table.
        rows = {self.num_items + 1, self.num_items + 2}
        rows |= set() if users is None else {users + 1, users + self.num_items + 2}
        layers = (nn.Linear, nn.RNNBase, nn.Conv1d, nn.Conv2d)  # may be of that size by chance
        owned = {
            id(p) for m in self.modules() if isinstance(m, layers) for p in m.parameters(False)
        }
        trained = (p for p in self.parameters() if p.requires_grad and id(p) not in owned)
        return [p for p in trained if p.ndim == 2 and len(p) in rows]

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """Sparse gradients cannot be clipped."""
        if self.sparse_gradients and trainer.gradient_clip_val:
            return "sparse gradients cannot be clipped: use table_optimizer=adamw or no gradient_clip_val"
        return None

    def configure_model(self) -> None:
        """Ask for sparse gradients before a strategy wraps the module."""
        tables = {id(table) for table in self.embedding_tables() if self.sparse_gradients}
        for module in self.modules():
            if isinstance(module, nn.Embedding) and id(module.weight) in tables:
                module.sparse = True

    def configure_optimizers(self) -> Any:
        """AdamW, with the schedule by step."""
        kind = AdamW if self.table_optimizer == "adamw" else TableAdamW
        optimizer = kind(
            self._parameter_groups(), lr=self.learning_rate, betas=self.betas, fused=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        rise, schedule = round(self.warmup * steps), self.schedule
        return scheduled(optimizer, lambda s: learning_rate_share(s, steps, rise, schedule))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.parameters() if p.requires_grad]
        by_row = self.table_optimizer == "rowwise_adagrad"
        tables = {id(table) for table in self.embedding_tables() if by_row}
        rest = [p for p in trained if id(p) not in tables]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if tables:
            groups.append({
                "params": [p for p in trained if id(p) in tables], "lr": self.table_learning_rate,
                "weight_decay": self.weight_decay, "rowwise": True,
            })  # fmt: skip
        return groups

    def _negatives(self, batch: Batch, where: Tensor) -> Tensor | None:
        """(N, K); (K,) shared by all positions, the same on every device; or None."""
        if self.negatives_a_step:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            seed = mix_seeds(data.seed, self.trainer.global_step, 1)
            log_q = self._log_probabilities(where.device) if self.popularity else None
            return draw_pool(self.negatives_a_step, seed, self.num_items, log_q).to(where.device)
        return None if batch.negatives is None else batch.negatives[where]

    def _log_probabilities(self, device: torch.device) -> Tensor:
        """(I + 1,) of an item to be drawn as a negative.

        Negatives of one position leave out its user's own items, and stand for those, too.
        """
        if self._log_q is None or self._log_q.device != device:
            counts = torch.from_numpy(self.histories.train_counts()) if self.popularity else None
            self._log_q = log_probabilities(self.num_items, counts, self.popularity).to(device)
        return self._log_q

    def _matmul_dtype(self) -> torch.dtype | None:
        """Half precision for the catalogue product when the trainer computes in it."""
        precision = str(self.trainer.precision)
        if precision.startswith("bf16"):
            return torch.bfloat16
        return torch.float16 if precision.startswith("16") else None

    def optimizer_zero_grad(self, epoch: int, batch_index: int, optimizer: Optimizer) -> None:
        """Drop gradients instead of filling them with zeros."""
        optimizer.zero_grad(set_to_none=True)
