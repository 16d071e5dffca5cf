"""Every trained or computed model, tiny, through the real command: it runs, is sound, and runs only once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import config

# SASRec has tests of its own; data configs and reference rows have no model.
NAMES = [
    name
    for name in config.names()
    if name.endswith("movielens_100k") and name.split("/")[0] not in ("data", "reference", "sasrec")
]


@pytest.mark.parametrize("name", NAMES)
def test_a_models_chain_runs(
    name: str, finish: Callable[..., Any], run_command: Callable[..., Any], tiny_movielens: Path
) -> None:
    fits = [n for n, stage in config.load(name).stages.items() if stage["run"] == "fit"]
    words = [
        f"data.root={tiny_movielens}", "data.expected=null", "launch.threads=1",
        "launch.accelerator=cpu", "~stages.reference",
        *(f"++stages.{fit}.trainer.max_epochs=2" for fit in fits),
        *(f"++stages.{fit}.trainer.check_val_every_n_epoch=1" for fit in fits),
    ]  # fmt: skip
    run = finish(name, words)
    (values,) = run.json("evaluate", "metrics.json")["rows"].values()
    assert values["all/n"]["value"] == 60  # users of the tiny data
    assert 0 <= values["all/ndcg@10"]["value"] <= values["all/hit@10"]["value"] <= 1
    assert math.isfinite(values["all/mrr"]["value"])
    again = run_command("exp", name, *words, runs=run.runs)
    assert again.returncode == 0
    assert "running" not in again.stdout + again.stderr
