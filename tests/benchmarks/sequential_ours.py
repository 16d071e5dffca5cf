"""Our SASRec, started by ``bench_sequential`` as a process of its own: the fit stage of an experiment.

Legend: R held-out rows, U users, I items.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from datamodules.types import TEST, VALID
from datamodules.types import Rows as AskedRows
from experiments import artifacts, build, config
from tests.benchmarks.sequential_measure import (
    EVAL_BATCH,
    Clock,
    K,
    Rows,
    ndcg_at_10,
    peak_memory,
    run_side,
    timed,
    watcher,
)
from tests.benchmarks.sequential_profile import profile

NAMES = {
    "hidden": "hidden_size", "blocks": "num_blocks", "heads": "num_heads", "dropout": "dropout",
    "max_length": "max_length", "learning_rate": "learning_rate",
}  # fmt: skip


def fit_parts(experiment: str, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """Data module and fit stage of a shipped experiment, with overrides as in make exp."""
    spec = artifacts.stage_spec(config.load(experiment, overrides), "train")
    data = build.build(spec["data"])
    data.batch_size, data.seed = spec["batch_size"], spec["seed"]
    return data, spec


def export(data: Any) -> Rows:
    """The split as arrays that need no library of ours to be read.

    Raises:
        ValueError: a held-out row's history is not what a peer would read from the arrays.
    """
    from datamodules.types import TRAIN

    events = data.histories
    rows = {
        "user": events.users, "item": events.items,
        "order": np.arange(len(events.items)) - events.offsets[events.users],  # place in time
        "train": events.split == TRAIN, "valid": events.split == VALID,
        "num_items": np.array(events.num_items),
    }  # fmt: skip
    known = rows["train"]
    for name, code in (("valid", VALID), ("test", TEST)):
        held_out = data.rows(code)
        number = np.bincount(rows["user"][known], minlength=events.num_users + 1)
        if (number[held_out.user] != held_out.position - events.offsets[held_out.user]).any():
            raise ValueError(f"the {name} rows' histories are not the events before their split")
        rows |= {f"{name}_user": held_out.user, f"{name}_item": held_out.target}
        known = known | rows["valid"]
    return rows


def best_items(module: Any, data: Any, code: int) -> np.ndarray:
    """(R, 10) items of the whole catalogue, those of the row's history left out."""
    rows, events = data.rows(code), data.histories
    found = []
    collate = module.eval().collator(training=False)
    for first in range(0, len(rows.user), EVAL_BATCH):
        part = np.arange(first, min(first + EVAL_BATCH, len(rows.user)))
        start, stop = events.offsets[rows.user[part]], rows.position[part]
        batch = collate(AskedRows(events, part, rows.user[part], start, stop, 0, 0))
        scores = module.user_vectors(batch) @ module.item_vectors().T  # (R, I + 1)
        scores[:, 0] = -torch.inf  # padding
        for row, (a, b) in enumerate(zip(start, stop, strict=True)):
            scores[row, events.items[a:b].astype(np.int64)] = -torch.inf
        found.append(scores.topk(K).indices.numpy())
    return np.concatenate(found)


def train(job: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Fit, with the comparison's settings or as shipped; then test, and profile if asked."""
    data, spec = fit_parts(job["experiment"], job["overrides"])
    pl.seed_everything(job["seed"], verbose=False)
    # As experiments/stage.py sets it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    node = next(iter(spec["modules"].values()))
    if (
        job["settings"] is not None
    ):  # the loss is the full softmax unless an experiment says otherwise
        asked = {NAMES[k]: v for k, v in job["settings"].items() if k in NAMES}
        node = {"_target_": node["_target_"], **asked}
        data.batch_size = job["settings"]["batch_size"]

    def measure() -> float:
        with torch.no_grad():
            return ndcg_at_10(best_items(module, data, VALID), rows["valid_item"])

    clock = Clock(measure, job["every"], job["name"])
    module = build.build_on(node, data)
    options: dict[str, Any] = dict(  # noqa: C408
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    own = spec["trainer"] | ({"max_epochs": job["epochs"]} if job["epochs"] else {})
    pl.Trainer(
        **own, **options, limit_val_batches=0, callbacks=[watcher(pl.Callback, clock)]
    ).fit(module, datamodule=data)  # fmt: skip
    fit_batch, data.batch_size = data.batch_size, EVAL_BATCH
    tester = pl.Trainer(**options)
    seconds, _ = timed(lambda: tester.test(module, datamodule=data, verbose=False))
    with torch.no_grad():
        ndcg = ndcg_at_10(best_items(module, data, TEST), rows["test_item"])
    result = {
        **clock.report(), "evaluation": seconds, "test_ndcg": ndcg, "peak": peak_memory(),
        "own_test_ndcg": module.results["all/ndcg@10"][0],
    }  # fmt: skip
    if job["profile"]:
        data.batch_size = fit_batch
        result["profile"] = profile(module, data, job["profile"])
    return result


if __name__ == "__main__":
    run_side(train)
