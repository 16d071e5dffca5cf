"""Every trained or computed model, tiny, through the real command: it runs, is sound, and runs only once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import config
from tests.lightning_modules.tiny_bert import LONGEST, write_tiny_bert

# SASRec and A-LLMRec have tests of their own; data configs and reference rows have no model.
NAMES = [
    name
    for name in config.names()
    if name.endswith("movielens_100k")
    and name.split("/")[0] not in ("data", "reference", "sasrec", "a_llmrec")
]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of the sentence encoder, so that nothing is downloaded."""
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("name", NAMES)
def test_a_models_chain_runs(
    name: str, finish: Callable[..., Any], run_command: Callable[..., Any], tiny_movielens: Path,
    tiny_encoder: Path,
) -> None:  # fmt: skip
    stages = config.load(name).stages
    fits = [n for n, stage in stages.items() if stage["run"] == "fit"]
    readers: list[Any] = []  # modules with an encoder, each once: later stages borrow them
    encoders = []
    for stage in fits or list(stages):
        module = stages[stage].get("module", {})
        if "encoder" in module and module not in readers:
            readers.append(module)
            encoder = f"_target_:{module['encoder']['_target_']},source:'{tiny_encoder}'"
            encoders.append(f"++stages.{stage}.module.encoder={{{encoder},max_length:{LONGEST}}}")
    words = [
        f"data.root={tiny_movielens}", "data.expected=null", "launch.threads=1",
        "launch.accelerator=cpu", "~stages.reference",
        *(f"++stages.{fit}.trainer.max_epochs=2" for fit in fits),
        *(f"++stages.{fit}.trainer.check_val_every_n_epoch=1" for fit in fits),
        *encoders,
    ]  # fmt: skip
    run = finish(name, words)
    (values,) = run.json("evaluate", "metrics.json")["rows"].values()
    assert values["all/n"]["value"] == 60  # users of the tiny data
    assert 0 <= values["all/ndcg@10"]["value"] <= values["all/hit@10"]["value"] <= 1
    assert math.isfinite(values["all/mrr"]["value"])
    again = run_command("exp", name, *words, runs=run.runs)
    assert again.returncode == 0
    assert "running" not in again.stdout + again.stderr
