"""W&B's logger: whatever fails of it, the run goes on."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from callbacks.wandb_run import WandbRun

SETTINGS = {"silent": True, "console": "off", "x_disable_stats": True, "init_timeout": 5.0}


def made(folder: Path, **options: Any) -> WandbRun:
    import wandb

    return WandbRun(
        project="p", save_dir=str(folder), id="abc", settings=wandb.Settings(**SETTINGS), **options
    )


class Broken:
    """A run whose service is gone."""

    id = "abc"

    def log(self, *unused: Any, **more: Any) -> None:
        raise ConnectionError("the service is gone")


def test_a_client_that_fails_is_told_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = made(tmp_path, experiment=Broken())
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            logger.log_metrics({"train/loss": 1.0}, step)
        logger.record({"stage/seconds": 1.0}, {}, {})
    assert [m for m in caplog.messages if "the run goes on" in m] == [
        "W&B logs nothing more of this run (the service is gone); the run goes on"
    ]


@pytest.mark.slow
def test_without_a_server_the_run_is_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    logger = made(tmp_path)
    with caplog.at_level(logging.WARNING):
        logger.log_metrics({"train/loss": 1.0}, 0)
        logger.record({}, {}, {})
    assert any("recorded offline" in m for m in caplog.messages)
    (run,) = (tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb")
    deadline = time.monotonic() + 60  # W&B's own process writes it
    while run.stat().st_size < 500 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert run.stat().st_size > 500
    written = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert b"a" * 40 not in written


@pytest.mark.slow
def test_tables_pictures_and_asked_scores_are_recorded(tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    scores.write_bytes(b"rows")
    logger = made(tmp_path, log_scores=True)
    picture = Image.new("RGB", (4, 4), "red")
    table = (("prompt", "picture"), [("<b>1</b>", picture), (None, None)])
    logger.record({"stage/seconds": 2.0}, {"samples": table}, {"plots/learning": picture}, scores)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (kept,) = run.rglob("samples_*.table.json")
    found = json.loads(kept.read_text())
    assert found["columns"] == ["prompt", "picture"]
    assert found["data"] == [["<b>1</b>", "Image"], [None, None]]  # the picture lies in an artifact
    assert len(list(run.rglob("plots/learning_*.png"))) == 1
    deadline = time.monotonic() + 60  # W&B's own process writes it
    while b"scores-abc" not in (run / "run-abc.wandb").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert logger._experiment is None  # the next row of a test begins one of its own
