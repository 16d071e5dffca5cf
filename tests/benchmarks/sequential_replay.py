"""RePlay's SASRec (0.22, ``replay.nn``, full cross-entropy), started in its own environment.

Built as ``SasRec.from_params`` builds it and fed by RePlay's own Parquet loader.

Legend: R held-out rows, I items (here 0..I - 1, padding I).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import numpy as np
import polars as pl
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import TorchTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms
from sequential_measure import (
    EVAL_BATCH,
    Clock,
    K,
    Rows,
    histories,
    ndcg_at_10,
    run_side,
    timed,
    watcher,
)


def schema(items: int, width: int) -> TensorSchema:
    """One feature: the item."""
    source = TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")
    feature = TensorFeatureInfo(
        "item_id", feature_type=FeatureType.CATEGORICAL, is_seq=True, cardinality=items,
        padding_value=items, embedding_dim=width, feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[source],
    )  # fmt: skip
    return TensorSchema([feature])


def write(rows: Rows, chosen: np.ndarray, file: Path, least: int = 1) -> int:
    """A row a user with at least ``least`` events in ``chosen`` (N,) bool; returns the longest history."""
    users, items = histories(rows, chosen)
    kept = [i for i, each in enumerate(items) if len(each) >= least]
    lists = [(items[i] - 1).astype(np.int64) for i in kept]
    frame = pl.DataFrame({"user_id": users[kept].astype(np.int64), "item_id": lists})
    frame.with_columns(seen_ids="item_id").write_parquet(file)
    return max(map(len, lists))


def loader(
    file: Path, stage: str, features: TensorSchema, length: int, seen: int, batch: int
) -> Any:
    """RePlay's data module of one stage; ``seen``: longest history, whose items are not recommended."""
    items = features.item_id_features.item().cardinality
    columns: dict[str, Any] = {"user_id": {}, "item_id": {"shape": length, "padding": items}}
    if stage == "predict":
        columns["seen_ids"] = {"shape": seen, "padding": -1}
    paths: dict[str, Any] = {f"{stage}_path": str(file)}
    transforms = {stage: make_default_sasrec_transforms(features)[stage]}
    module = ParquetModule(
        batch_size=batch, metadata={stage: columns}, transforms=transforms, **paths
    )
    module.setup(stage)
    return module


def train(job: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Fit with the job's settings, then predict for all test users."""
    with TemporaryDirectory() as folder:
        return train_in(Path(folder), job, rows)


def train_in(folder: Path, job: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """``train`` with a folder for RePlay's files."""
    asked, items = job["settings"], int(rows["num_items"])
    features = schema(items, asked["hidden"])
    length, files = asked["max_length"], {s: folder / f"{s}.parquet" for s in ("fit", "val", "all")}
    write(rows, rows["train"], files["fit"], least=2)
    longest = write(rows, rows["train"], files["val"])
    longest_of_all = write(rows, rows["train"] | rows["valid"], files["all"])
    valid = loader(files["val"], "predict", features, length, longest, EVAL_BATCH)
    test = loader(files["all"], "predict", features, length, longest_of_all, EVAL_BATCH)
    unseen = SeenItemsFilter(item_count=items)

    def table(found: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
        """(U + 1, 10) items of (users, their items) pairs."""
        best = np.zeros((int(rows["user"].max()) + 1, K), np.int64)
        for users, top in found:
            best[users.flatten().numpy()] = top.numpy() + 1
        return best

    @torch.no_grad()
    def validation() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # A second trainer would take the module away from the one that is fitting it.
        module.eval()
        for raw in valid.predict_dataloader():
            batch = valid.compiled_transforms["predict"](raw)
            scores = unseen.on_prediction(batch, module(batch)["logits"])
            yield batch["user_id"], scores.topk(K).indices

    def recommend() -> np.ndarray:
        best = TorchTopItemsCallback(K, "user_id", postprocessors=[unseen])
        lightning.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=[best],
        ).predict(module, datamodule=test, return_predictions=False)  # fmt: skip
        users, top, _ = best.get_result()
        return table(iter([(users, top)]))[rows["test_user"]]

    clock = Clock(
        lambda: ndcg_at_10(table(validation())[rows["valid_user"]], rows["valid_item"]),
        job["every"], job["name"],
    )  # fmt: skip
    model = SasRec.from_params(
        features, embedding_dim=asked["hidden"], num_heads=asked["heads"],
        num_blocks=asked["blocks"], max_sequence_length=length, dropout=asked["dropout"],
    )  # fmt: skip
    module = LightningModule(model, OptimizerFactory(learning_rate=asked["learning_rate"]))
    data = loader(files["fit"], "train", features, length + 1, 0, asked["batch_size"])
    lightning.Trainer(
        max_epochs=job["epochs"], accelerator="cpu", devices=1, logger=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[watcher(lightning.Callback, clock)],
    ).fit(module, datamodule=data)  # fmt: skip
    seconds, top = timed(recommend)
    ndcg = ndcg_at_10(top, rows["test_item"])
    return {**clock.report(), "evaluation": seconds, "test_ndcg": ndcg}


if __name__ == "__main__":
    run_side(train)
