"""RecBole's SASRec (1.2.1, cross-entropy), started by ``bench_sequential`` in its own environment.

RecBole turns every prefix of a history into a row, so that an epoch takes minutes: some steps are timed
and the epoch is extrapolated from them. Its full ranking of sequential models does not leave seen items
out, and after so few steps its quality means nothing, so none is reported.

Legend: N events.
"""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from sequential_measure import EVAL_BATCH, Rows, run_side, say, timed


def config(job: dict[str, Any], folder: Path) -> Config:
    """The job's settings; leave-one-out by the place in the history gives the exported split."""
    asked = job["settings"]
    values = {
        "data_path": str(folder), "checkpoint_dir": str(folder), "state": "ERROR",
        "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "train_neg_sample_args": None, "loss_type": "CE", "metrics": ["NDCG"], "topk": [10],
        "valid_metric": "NDCG@10", "MAX_ITEM_LIST_LENGTH": asked["max_length"],
        "n_layers": asked["blocks"], "n_heads": asked["heads"], "hidden_size": asked["hidden"],
        "inner_size": asked["hidden"], "hidden_dropout_prob": asked["dropout"],
        "attn_dropout_prob": asked["dropout"], "learning_rate": asked["learning_rate"],
        "train_batch_size": asked["batch_size"], "eval_batch_size": EVAL_BATCH,
        "epochs": 1, "use_gpu": False, "seed": job["seed"], "show_progress": False,
    }  # fmt: skip
    return Config(model="SASRec", dataset="bench", config_dict=values)


def write(rows: Rows, folder: Path) -> None:
    """RecBole's atomic file."""
    names = {"user": "user_id:token", "item": "item_id:token", "order": "timestamp:float"}
    frame = pd.DataFrame({title: rows[name] for name, title in names.items()})
    (folder / "bench").mkdir()
    frame.to_csv(folder / "bench" / "bench.inter", sep="\t", index=False)


def require_same_split(rows: Rows, dataset: Any, test: Any) -> None:
    """Its test targets must be those of the exported split."""
    held_out = test.dataset.inter_feat
    pairs = [dataset.id2token(name, held_out[name].numpy()) for name in ("user_id", "item_id")]
    theirs = dict(zip(*(each.astype(np.int64).tolist() for each in pairs), strict=True))
    ours = dict(zip(rows["test_user"].tolist(), rows["test_item"].tolist(), strict=True))
    if theirs != ours:
        raise RuntimeError("RecBole's leave-one-out split is not the exported one")


def train(job: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Time ``job["steps"]`` steps and the evaluation of all test users."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(rows, folder)
        began = time.perf_counter()
        settings = config(job, folder)
        dataset = create_dataset(settings)
        train_data, _, test_data = data_preparation(settings, dataset)
        require_same_split(rows, dataset, test_data)
        trainer = Trainer(settings, SASRec(settings, train_data.dataset))
        setup = time.perf_counter() - began
        steps = min(job["steps"], len(train_data))
        trainer._train_epoch(list(islice(train_data, 3)), 0)  # warm
        began = time.perf_counter()
        trainer._train_epoch(islice(train_data, steps), 0)
        epoch = (time.perf_counter() - began) / steps * len(train_data)
        say(f"{job['name']}: {steps} of {len(train_data)} steps, {epoch:.0f} s an epoch")
        seconds, _ = timed(lambda: trainer.evaluate(test_data, load_best_model=False))
    return {
        "setup": setup, "epoch_seconds": [epoch], "trace": [], "evaluation": seconds,
        "test_ndcg": None, "steps": steps, "steps_of_epoch": len(train_data),
    }  # fmt: skip


if __name__ == "__main__":
    run_side(train)
