"""A-LLMRec's chain, tiny, through the real command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_modules.tiny_bert import LONGEST, write_tiny_bert

ALIGNMENT = "a_llmrec/movielens_100k_alignment"


@pytest.fixture(scope="module")
def words(tiny_movielens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make every stage small."""
    encoder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return [
        f"data.root={tiny_movielens}", "data.expected=null", "launch.threads=1",
        "launch.accelerator=cpu", "backbone.trainer.max_epochs=2",
        "stages.alignment.trainer.max_epochs=2",
        f"stages.alignment.module.encoder.source={encoder}",
        f"stages.alignment.module.encoder.max_length={LONGEST}",
    ]  # fmt: skip


def test_the_first_stage_runs_and_keeps_what_it_trained(
    finish: Callable[..., Any], run_command: Callable[..., Any], words: list[str]
) -> None:
    run = finish(ALIGNMENT, words)
    state = torch.load(run.folder("alignment") / "best.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"item_coder", "text_coder", "encoder"}
    rows = {s: run.json(s, "metrics.json") for s in
            ("evaluate", "evaluate_texts", "evaluate_backbone", "reference")}  # fmt: skip
    assert len({row["fingerprint"] for row in rows.values()}) == 1  # one table holds them all
    for stage in ("evaluate", "evaluate_texts", "evaluate_backbone"):
        (values,) = rows[stage]["rows"].values()
        assert values["all/n"]["value"] == 60
        assert 0 < values["all/hit@20"]["value"] == 1  # the target and 19 others
        assert 0 <= values["all/hit@1"]["value"] <= values["all/hit@5"]["value"] <= 1
    again = run_command("exp", ALIGNMENT, *words, runs=run.runs)
    assert again.returncode == 0
    assert "running" not in again.stdout + again.stderr


def test_other_backbones_stand_in_its_place(finish: Callable[..., Any], words: list[str]) -> None:
    """One that reads no history and one that is not causal; a frozen encoder."""
    frozen = ["stages.alignment.module.encoder_trained=none"]
    frozen += ["~stages.evaluate_texts", "~stages.evaluate_backbone"]
    for name in ("lightgcn", "bert4rec"):
        extra = [f"backbone={name}", "backbone.trainer.check_val_every_n_epoch=1"]
        run = finish(ALIGNMENT, [*words, *frozen, *extra, "~stages.reference"])
        (values,) = run.json("evaluate", "metrics.json")["rows"].values()
        assert values["all/n"]["value"] == 60


def test_what_cannot_be_is_said_before_anything_is_trained(
    run_command: Callable[..., Any], words: list[str], tmp_path: Path
) -> None:
    result = run_command("exp", ALIGNMENT, *words, "backbone=sasrecc", runs=tmp_path)
    assert result.returncode != 0
    assert "sasrec" in result.stderr
