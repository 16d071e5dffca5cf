"""What a driver does with a stage of which it finds other things than it had planned with."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import artifacts, run


@pytest.mark.parametrize(("waited", "again"), [(True, 0), (False, 1)])
def test_a_stale_stage_that_another_driver_has_just_made_anew_is_not_made_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: bool, again: int
) -> None:
    """Two seeds of an array share the rows without a model."""
    done = tmp_path / "done.json"
    mark = {"sources": {}, "seconds": 1.0}
    done.write_text(json.dumps({**mark, "finished": "yesterday"}))

    @contextmanager
    def hold(folder: Path, wait: bool) -> Iterator[list[str]]:
        if waited:
            done.write_text(json.dumps({**mark, "finished": "today"}))
        yield []

    started: list[Any] = []
    monkeypatch.setattr(run.lock, "hold", hold)
    monkeypatch.setattr(run, "in_process", lambda *words: started.append(words))
    monkeypatch.setattr(run, "_job", lambda *unused: {"launch": None})
    monkeypatch.setattr(run.config, "origins", lambda *unused: {})
    monkeypatch.setattr(run, "_prepared_folder", lambda *unused: tmp_path)
    monkeypatch.setattr(run.data_report, "manifests", lambda *unused: {})
    stage: Any = SimpleNamespace(folder=tmp_path, state=artifacts.STALE, spec={"data": {}})
    experiment: Any = SimpleNamespace(config={}, name="a/b", overrides=())
    run.run_stage(experiment, stage, rerun_stale=True)
    assert len(started) == again
    assert done.exists() == waited
    # What is there, but is no mark, is the end of nothing.
    done.write_text("[1, 2]")
    started.clear()
    monkeypatch.setattr(run.lock, "hold", lambda *_, **__: nullcontext([]))
    run.run_stage(experiment, stage)
    assert len(started) == 1


@pytest.mark.parametrize(
    ("stage", "checkpoint", "told"),
    [
        (None, False, "stopped"),
        ("predict", False, "stopped; the same command goes on where it stood"),
        ("fit", False, "stopped; no epoch had ended, so that the same command begins this stage again (a "
         "single Ctrl-C, or kill -USR1, saves inside an epoch)"),
        ("fit", True, "stopped; the same command goes on from the last checkpoint"),
    ],
)  # fmt: skip
def test_what_was_stopped_goes_on_from_a_checkpoint_only_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    stage: str | None, checkpoint: bool, told: str,
) -> None:  # fmt: skip
    if checkpoint:
        (tmp_path / "last.ckpt").touch()
    (tmp_path / "stage.json").write_text(json.dumps({"spec": {"run": stage}}))
    folder = tmp_path if stage else None
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers here are pytest's
    monkeypatch.setattr(run.lock, "add_child", lambda *_: None)
    # The child says, as a stage does, that a signal has ended it.
    ends = [sys.executable, "-c", "raise SystemExit(130)"]
    monkeypatch.setattr(run.launchers, "command", lambda *_: ends)
    monkeypatch.setattr(run, "_run", lambda *_: run.in_process("experiments.stage", [], folder))
    assert run.main(["exp", "a/b"]) == 130
    assert capsys.readouterr().err == told + "\n"
    monkeypatch.setattr(run, "_run", lambda *_: signal.default_int_handler(15, None))
    assert run.main(["exp", "a/b"]) == 130
    assert capsys.readouterr().err == "stopped\n"
