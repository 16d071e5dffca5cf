"""What a driver does with a stage of which it finds other things than it had planned with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
    done.write_text(json.dumps({"finished": "yesterday"}))

    @contextmanager
    def hold(folder: Path, wait: bool) -> Iterator[list[str]]:
        if waited:
            done.write_text(json.dumps({"finished": "today"}))
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
