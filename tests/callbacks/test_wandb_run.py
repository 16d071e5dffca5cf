"""W&B's logger: whatever fails of it, the run goes on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from callbacks.wandb_run import WandbRun
from tests.callbacks.wandb_server import Server

SETTINGS = {"silent": True, "console": "off", "x_disable_stats": True, "init_timeout": 5.0}


def made(folder: Path, **options: Any) -> WandbRun:
    import wandb

    more = {name: options.pop(name) for name in list(options) if name.startswith("finish_")}
    settings = wandb.Settings(**SETTINGS, **more)
    return WandbRun(project="p", save_dir=str(folder), id="abc", settings=settings, **options)


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


def test_tables_that_need_the_server_take_no_numbers_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(id="abc", log=logged.append, finish=lambda: logged.append("finished"))
    logger = made(tmp_path, experiment=run)

    def rows() -> Iterator[Any]:
        raise ConnectionError("it does not answer")
        yield

    with caplog.at_level(logging.WARNING):
        logger.record({"stage/seconds": 1.0}, {"settings": (("name",), rows())}, {})
    assert logged == [{"stage/seconds": 1.0}, "finished"]
    assert "W&B takes no tables and pictures of this run (it does not answer)" in caplog.messages


@pytest.mark.slow
def test_without_a_server_the_run_is_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(WandbRun, "offline", False)
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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    import wandb

    monkeypatch.setattr(WandbRun, "offline", False)
    wandb.teardown()  # what an earlier test's variables said
    made = Server()
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.stop()
    wandb.teardown()


def sync(*words: str) -> str:
    """``wandb sync``, as a user types it; what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


ABOUT: dict[str, Any] = {
    "name": "sasrec train", "group": "sasrec/x", "job_type": "train", "tags": ["ml"],
    "config": {"seed": 3}, "resume": "allow",
}  # fmt: skip


@pytest.mark.slow
def test_a_server_that_stops_answering_ends_no_run_and_is_sent_the_rest_later(
    tmp_path: Path,
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logger = made(tmp_path, finish_timeout=2.0, finish_timeout_raises=True, **ABOUT)
    logger.log_metrics({"train/loss": 1.0}, 0)
    assert list(server.runs) == ["abc"]
    server.silent.set()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            logger.log_metrics({"train/loss": 1.0 - step / 4}, step)
        logger.record({"stage/seconds": 2.0}, {}, {})
    assert time.monotonic() - started < 20
    (run,) = (tmp_path / "wandb").glob("run-*-abc")
    (told,) = [m for m in caplog.messages if m.startswith("W&B ")]
    assert "W&B does not answer; the run has ended all the same" in told
    assert told.endswith(f"wandb sync --no-skip-online {os.path.relpath(run)}")
    following = made(tmp_path, **ABOUT)
    following.log_metrics({"train/loss": 1.0}, 0)
    assert following.experiment.offline, "the next row would wait for the server again"
    following.experiment.finish()
    later = Server()
    monkeypatch.setenv("WANDB_BASE_URL", later.url)
    assert "Skipped 1 online run" in sync(str(run)), "or --no-skip-online is needed no more"
    sync("--no-skip-online", str(run))
    assert list(later.runs) == ["abc"]
    assert later.history("abc", "train/loss") == [1.0, 0.75, 0.5, 0.25]
    assert later.runs["abc"]["summary"]["stage/seconds"] == 2
    later.stop()


@pytest.mark.slow
def test_what_was_recorded_offline_is_sent_as_the_run_that_it_is(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two pieces, as of a stage that was cut off and resumed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for piece in ({0: 1.0, 1: 0.75}, {2: 0.5}):
        logger = made(tmp_path, **ABOUT)
        for step, loss in piece.items():
            logger.log_metrics({"train/loss": loss}, step)
        logger.record({"val/all/ndcg@10": 1 - loss}, {}, {})
        time.sleep(1.1)  # a folder is named by the second
    assert server.runs == {}
    monkeypatch.setenv("WANDB_MODE", "online")
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*-abc")):
        sync(str(folder))
    (sent,) = server.runs.values()
    assert list(server.runs) == ["abc"]
    told = {name: sent[name] for name in ("displayName", "groupName", "jobType", "tags")}
    assert told == {
        "displayName": "sasrec train", "groupName": "sasrec/x", "jobType": "train", "tags": ["ml"]
    }  # fmt: skip
    assert sent["config"]["seed"] == {"value": 3}
    assert server.history("abc", "train/loss") == [1.0, 0.75, 0.5]
    assert sent["summary"]["val/all/ndcg@10"] == 0.5


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
