"""A projector is trained on drawn pictures, and another stage begins with it, through the real command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

NAME = "tallrec/movie_zero_shot"  # has a language model to swap; its own stages are left out
ROWS = "_target_: datamodules.captioned_pictures.CaptionedPictures, train: 24, valid: 8"
MODULE = (
    "_target_: lightning_modules.align_vision.AlignVisionModule, llm: ${llm}, learning_rate: 0.01, "
    "warmup_steps: 0"
)
REST = "batch_size: 8, select: {metric: val/loss, mode: min}, trainer: {max_epochs: 2}"
STAGE = f"run: fit, data: {{{ROWS}}}, module: {{{MODULE}}}, {REST}"
WORDS = [
    "llm=tiny_random_vision", "~stages.evaluate", "~stages.reference", "launch.accelerator=cpu",
    "launch.threads=1", f"+stages.align={{{STAGE}}}",
]  # fmt: skip
AGAIN = f"+stages.again={{inputs: {{llm.projector: align/best.ckpt}}, {STAGE}}}"


@pytest.fixture(scope="module")
def finished(finish: Callable[..., Any]) -> Any:
    return finish(NAME, [*WORDS, AGAIN])


def projector(folder: Path, name: str) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = torch.load(
        folder / name, map_location="cpu", weights_only=True
    )["state_dict"]
    return kept


def test_a_stage_leaves_a_projector_that_another_begins_with(finished: Any) -> None:
    first = projector(finished.folder("align"), "best.ckpt")
    assert all(".multi_modal_projector." in name for name in first)
    second = projector(finished.folder("again"), "best.ckpt")
    assert first.keys() == second.keys()
    selected = [
        finished.json(stage, "done.json")["results"]["selected"]["val/loss"]
        for stage in ("align", "again")
    ]
    assert selected[1] < selected[0]  # it goes on where the first ended
    assert "attribute accuracy by chance: colour 0." in finished.result.stderr


def test_another_projector_is_another_stage(finished: Any, run_command: Callable[..., Any]) -> None:
    again = run_command("exp", NAME, *WORDS, AGAIN, runs=finished.runs)
    assert again.returncode == 0, again.stderr
    assert "running" not in again.stderr
    longer = ["stages.align.module.learning_rate=0.02"]
    planned = run_command("plan", NAME, *WORDS, AGAIN, *longer, runs=finished.runs)
    assert planned.returncode == 0, planned.stderr
    assert "unlike align_vision.align" in planned.stdout
    assert planned.stdout.count("missing") == 2  # what begins with it is another stage, too
