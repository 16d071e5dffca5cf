"""Trials at once on one machine: each has GPUs of its own, and there are no more of them than that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import config, sweep_devices, sweep_work

NAME = "sasrec/movielens_100k"


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep_devices, "DRIVER", tmp_path)
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / name).mkdir()
    assert sweep_devices.visible({}) == ["0", "1", "2"]
    assert sweep_devices.visible({"CUDA_VISIBLE_DEVICES": "GPU-a, 3"}) == ["GPU-a", "3"]
    assert sweep_devices.visible({"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setattr(sweep_devices, "DRIVER", tmp_path / "none")
    assert sweep_devices.visible({}) == []


def test_a_trial_takes_what_its_largest_stage_takes() -> None:
    def each(*overrides: str, stages: tuple[str, ...] = ("train", "evaluate")) -> int:
        return sweep_devices.each_trial(config.load(NAME, overrides), stages)

    assert each() == 1
    assert each("launch.devices=4") == 4
    assert each("launch.accelerator=cpu", "launch.devices=4") == 0
    assert each("+stages.train.launch={devices:2}") == 2
    assert each("+stages.train.launch={devices:2}", stages=("evaluate",)) == 1
    assert each("+stages.train.launch={accelerator:cpu}", stages=("train",)) == 0


@pytest.mark.parametrize(
    ("jobs", "each", "gpus", "fit"),
    [(2, 1, 4, 2), (8, 1, 4, 4), (8, 2, 4, 2), (8, 3, 4, 1), (2, 4, 1, 1), (8, 0, 4, 8), (8, 1, 0, 8)],
)  # fmt: skip
def test_no_more_run_at_once_than_have_gpus(jobs: int, each: int, gpus: int, fit: int) -> None:
    names = [str(number) for number in range(gpus)]
    found, told = sweep_devices.at_once(jobs, each, names)
    assert found == fit
    assert (told is None) == (fit == jobs)
    if told:
        assert f"JOBS={jobs}, but {gpus} GPUs are enough for {fit} at once" in told
    seen = [sweep_devices.share(slot, found, each, names) for slot in range(found)]
    dealt = [
        name for one in seen for name in one.get("CUDA_VISIBLE_DEVICES", "").split(",") if name
    ]
    if found > 1 and each and gpus:
        assert [len(one["CUDA_VISIBLE_DEVICES"].split(",")) for one in seen] == [each] * found
        assert len(set(dealt)) == len(dealt)
    else:
        assert dealt == [], "what there is is seen by all"


def test_a_gpu_that_is_named_twice_takes_two_trials() -> None:
    names = ["0", "0", "1", "1"]
    assert sweep_devices.at_once(4, 1, names) == (4, None)
    seen = [sweep_devices.share(slot, 2, 2, names)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert seen == ["0,1", "0,1"]


def test_trials_are_started_with_their_gpus_and_fill_free_places(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two GPUs, five trials, of which the first ends last."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(sweep_work, "POLL_SECONDS", 0.0)
    waiting, started, left = list(range(5)), dict[int, str](), {0: 9}
    study = SimpleNamespace(
        next=lambda: waiting.pop(0) + 1 if waiting else None, elsewhere=lambda: 0
    )

    def start(sweep: Any, asked: int, jobs: int, devices: dict[str, str], words: Any) -> int:
        assert jobs == 2
        started[asked - 1] = devices["CUDA_VISIBLE_DEVICES"]
        return asked - 1

    def ended(sweep: Any, study: Any, worker: int) -> str | None:
        left[worker] = left.get(worker, 1) - 1
        return None if left[worker] else "done"

    for name, stand_in in (("_start", start), ("_ended", ended)):
        monkeypatch.setattr(sweep_work, name, stand_in)
    for name in ("_say", "_stop"):
        monkeypatch.setattr(sweep_work, name, lambda *unused: None)
    monkeypatch.setattr(sweep_work, "told", lambda *unused: 0)
    sweep: Any = SimpleNamespace(study=lambda: study, gpus=1, total=5)
    assert sweep_work.work(sweep, 3, []) == 0
    assert started == {0: "4", 1: "6", 2: "6", 3: "6", 4: "6"}
    assert "JOBS=3, but 2 GPUs" in capsys.readouterr().err
