"""RecTools' SASRec (0.19, softmax loss), started by ``bench_sequential`` in its own environment.

Legend: R held-out rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from sequential_measure import EVAL_BATCH, Clock, K, Rows, ndcg_at_10, run_side, timed, watcher


def dataset(rows: Rows, chosen: np.ndarray) -> Dataset:
    """Events in ``chosen`` (N,) bool; their place in the user's history stands for the time."""
    frame = pd.DataFrame(
        {
            Columns.User: rows["user"][chosen],
            Columns.Item: rows["item"][chosen],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(rows["order"][chosen], unit="s"),
        }
    )
    return Dataset.construct(frame)


def train(job: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Fit with the job's settings, everything else as it comes; then recommend to all test users."""
    asked = job["settings"]
    learned, known = dataset(rows, rows["train"]), dataset(rows, rows["train"] | rows["valid"])

    def top(users: np.ndarray, history: Dataset) -> np.ndarray:
        """(R, 10) items."""
        model.is_fitted = True
        found = model.recommend(users, history, k=K, filter_viewed=True)
        table = np.zeros((int(rows["user"].max()) + 1, K), np.int64)
        table[found[Columns.User], found[Columns.Rank] - 1] = found[Columns.Item]
        return table[users]

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=job["epochs"], accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[watcher(Callback, clock)],
        )  # fmt: skip

    clock = Clock(
        lambda: ndcg_at_10(top(rows["valid_user"], learned), rows["valid_item"]),
        job["every"], job["name"],
    )  # fmt: skip
    model = SASRecModel(
        n_blocks=asked["blocks"], n_heads=asked["heads"], n_factors=asked["hidden"],
        dropout_rate=asked["dropout"], session_max_len=asked["max_length"], loss="softmax",
        lr=asked["learning_rate"], batch_size=asked["batch_size"], epochs=job["epochs"],
        recommend_batch_size=EVAL_BATCH, recommend_torch_device="cpu", get_trainer_func=trainer,
    )  # fmt: skip
    model.fit(learned)
    seconds, best = timed(lambda: top(rows["test_user"], known))
    ndcg = ndcg_at_10(best, rows["test_item"])
    return {**clock.report(), "evaluation": seconds, "test_ndcg": ndcg}


if __name__ == "__main__":
    run_side(train)
