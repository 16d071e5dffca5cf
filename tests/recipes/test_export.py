"""``make export`` of a collaborative model: files that plain tools read, and a card of what they are."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

from tests import preloaded
from tests.recipes.conftest import EXPERIMENT

runtime = pytest.importorskip("onnxruntime")


def export(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return preloaded.run("experiments.export", *words, env=environment)


def test_sasrec_outside_of_the_project_ranks_as_it_was_evaluated(
    finished: Any, tiny: list[str], command_environment: Any
) -> None:
    result = export(command_environment(finished.runs), EXPERIMENT, *tiny)
    assert result.returncode == 0, result.stderr[-2000:]
    folder = finished.folder("train") / "export"
    ids = pl.read_parquet(folder / "items.parquet")
    internal = dict(zip(ids["item_id"], ids["internal_id"], strict=True))
    table = pl.read_parquet(finished.folder("evaluate") / "scores.evaluate.parquet")
    row = table.row(4, named=True)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    about = json.loads((folder / "model.json").read_text())
    assert about["inputs"].keys() == {"history"}
    # The history as the raw file has it: all events of the user but the newest, which is the target.
    root = next(w for w in tiny if w.startswith("data.root=")).partition("=")[2]
    events = pl.read_csv(
        f"{root}/u.data",
        separator="\t",
        has_header=False,
        new_columns=["user", "item", "rating", "time"],
    )
    own = events.filter(pl.col("user") == int(row["user_id"])).sort("time", maintain_order=True)
    raw = own["item"].cast(pl.String).to_list()
    assert raw[-1] == row["target_id"]
    newest = [internal[i] for i in raw[:-1]][-given.shape[1] :]
    history = np.zeros((1, given.shape[1]), np.int64)
    history[0, : len(newest)] = newest
    ((scores,),) = session.run(None, {"history": history})
    for item, score in zip(row["top_items"][:10], row["top_scores"][:10], strict=True):
        assert scores[internal[item]] == pytest.approx(score, abs=1e-4)

    tensors = load_file(folder / "model.safetensors")
    state = torch.load(finished.folder("train") / "best.ckpt", weights_only=True)["state_dict"]
    for name, weight in state.items():
        assert np.array_equal(tensors[name], weight.numpy()), name

    card = (folder / "README.md").read_text()
    metrics = finished.json("evaluate", "metrics.json")
    assert metrics["fingerprint"] in card
    told = metrics["rows"]["evaluate"]["all/ndcg@10"]
    low, high = (told["value"] + side * 1.96 * told["stderr"] for side in (-1, 1))
    assert f"| all | ndcg@10 | {told['value']:.4f} | {low:.4f} to {high:.4f} |" in card
    for part in (
        "60 users",
        "CPU-hours",
        "## Limits",
        "`model.onnx`",
        str(finished.json("train", "done.json")["commit"]),
    ):
        assert part in card
    assert root not in card


def test_what_has_nothing_to_export_says_so(
    finish: Any, tiny_movielens: Any, command_environment: Any
) -> None:
    words = [
        f"data.root={tiny_movielens}",
        "data.expected=null",
        "launch.accelerator=cpu",
        "~stages.reference",
    ]
    run = finish("popularity/movielens_100k", words)
    result = export(command_environment(run.runs), "popularity/movielens_100k", *words)
    assert result.returncode == 2
    assert "tests no collaborative model that was trained" in result.stderr
