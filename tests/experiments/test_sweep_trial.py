"""Where a trial's value comes from, and what a sweep tells of its trials."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from experiments import config, launchers, sweep_report, sweep_space, sweep_trial, trial_driver
from experiments.errors import UserError
from experiments.sweep_plots import drawn
from experiments.sweep_study import Tried

SASREC = "sasrec/movielens_100k"
FUSION = "fusion/movielens_100k_text"


def space(**settings: Any) -> sweep_space.Space:
    told = {"sampler": "grid", "metric": "ndcg@10", "parameters": {"seed": [0, 1]}, **settings}
    return sweep_space.parse(told, "x.yaml")


def aim(name: str, *overrides: str, **settings: Any) -> sweep_trial.Target:
    return sweep_trial.target(space(**settings), config.load(name, overrides))


def test_validation_is_of_the_fit_and_no_stage_behind_it_is_run() -> None:
    found = aim(SASREC)
    assert found == sweep_trial.Target("train", True, "val/all/ndcg@10", ("train",))
    assert aim(SASREC, metric="val/cold_item/hit@1").metric == "val/cold_item/hit@1"


def test_a_method_without_a_fit_is_validated_by_its_test_stage() -> None:
    found = aim("ease/movielens_100k", metric="hit@10")
    assert (found.stage, found.fit, found.metric) == ("evaluate", False, "all/hit@10")
    assert found.words == ("++stages.evaluate.split=valid",)
    changed = config.load("ease/movielens_100k", found.words)
    assert changed.stages["evaluate"]["split"] == "valid"


def test_the_test_set_is_read_where_it_is_asked_for_alone() -> None:
    found = aim(SASREC, on="test")
    assert (found.stage, found.words) == ("evaluate", ())
    assert found.needs == ("train", "evaluate")
    with pytest.raises(UserError, match="reads what evaluate_backbone has scored of the test set"):
        aim(FUSION, stage="evaluate_fusion")
    with pytest.raises(UserError, match="say stage:"):
        aim(FUSION, on="test")


def test_stages_that_cannot_tell_the_metric() -> None:
    with pytest.raises(UserError, match=r"stage: trian is none of .*did you mean 'train'"):
        aim(SASREC, stage="trian")
    with pytest.raises(UserError, match="is no test of one module"):
        aim(SASREC, stage="train", on="test")
    with pytest.raises(UserError, match="is no fit or test of one module"):
        aim(SASREC, stage="reference")
    with pytest.raises(UserError, match="say mode: max"):
        aim(SASREC, mode="min")


def fitted(folder: Path, select: Any) -> Path:
    """A finished fit of three epochs, its log written in two attempts and at the moment."""
    (folder / "csv" / "version_0").mkdir(parents=True)
    (folder / "csv" / "version_1").mkdir()
    lines = "epoch,step,val/all/ndcg@10,val/all/hit@1,train/loss\n0,9,0.1,0.01,\n0,9,,,2.0\n1,19,0.7,0.02,\n"
    (folder / "csv" / "version_0" / "metrics.csv").write_text(lines)
    lines = "epoch,step,val/all/ndcg@10,val/all/hit@1\n1,19,0.3,0.02\n2,29,0.2,0.05\n3,39,0.9"
    (folder / "csv" / "version_1" / "metrics.csv").write_text(lines)
    (folder / "stage.json").write_text(json.dumps({"spec": {"select": select}}))
    chosen = {select["metric"]: 0.3} if select else None
    (folder / "done.json").write_text(json.dumps({"results": {"selected": chosen}}))
    return folder


def test_a_value_is_that_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    folder = fitted(tmp_path / "a", {"metric": "val/all/ndcg@10"})
    found = sweep_trial.curves(folder, ["val/all/ndcg@10", "val/all/hit@1"])
    assert found["val/all/ndcg@10"] == {1: 0.1, 2: 0.3, 3: 0.2}, "of an epoch done again the last"
    assert sweep_trial._of_fit(folder, "val/all/ndcg@10") == 0.3
    assert sweep_trial._of_fit(folder, "val/all/hit@1") == 0.02, "of the epoch that ndcg@10 chose"
    lowest = fitted(tmp_path / "b", {"metric": "val/all/ndcg@10", "mode": "min"})
    assert sweep_trial._of_fit(lowest, "val/all/hit@1") == 0.01
    assert sweep_trial._of_fit(fitted(tmp_path / "c", None), "val/all/hit@1") == 0.05
    with pytest.raises(UserError, match=r"does not report val/all/auc.*it reports val/all/hit@1"):
        sweep_trial.curves(folder, ["val/all/auc"])


def test_a_trial_waits_for_a_stage_that_another_one_runs() -> None:
    assert not trial_driver.waits({})
    assert trial_driver.waits({trial_driver.SWEEP: "7"})
    assert trial_driver.waits({launchers.SRUN: ""})


PARAMETERS = {"loss": ["ce", "it's $b"], "n": ["1", "2", "3"]}


def tried() -> list[Tried]:
    """A trial of each kind, of the points of a grid of two by three."""
    names = ("done", "failed", "done", "pruned", "done", "waiting")
    values = (0.2, None, 0.4, 0.3, 0.4, None)
    points = space(parameters=PARAMETERS).points()
    return [
        Tried(place, point, name, value, 7.0, None, "it fell" if name == "failed" else "", 2)
        for place, (name, value, point) in enumerate(zip(names, values, points, strict=True))
    ]


def told(folder: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    made = space(parameters=PARAMETERS, **settings)
    folder.mkdir(exist_ok=True)
    experiment = config.load(SASREC, ["seed=3"])
    sweep_report.tell(folder, experiment, made, sweep_trial.target(made, experiment), tried())
    return capsys.readouterr().out


def test_trials_are_told_best_first_and_the_best_by_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = told(tmp_path / "a", capsys)
    found = list(csv.DictReader(io.StringIO((tmp_path / "a" / "trials.csv").read_text())))
    assert [r["trial"] for r in found] == ["2", "4", "0", "3", "5", "1"]
    assert "trial 1 failed: it fell" in out
    line = next(li for li in out.splitlines() if li.startswith("the best, trial 2"))
    words = shlex.split(shlex.split(line)[-1].removeprefix("ARGS="))
    assert words == ["seed=3", "loss=ce", "n='3'"]
    assert shlex.split(found[1]["overrides"]) == ["seed=3", r"loss='it\'s $b'", "n='2'"]
    lowest = space(parameters=PARAMETERS, mode="min")
    best = sweep_report.best(tried(), lowest)
    assert best
    assert best.place == 0
    assert r"\|" not in (tmp_path / "a" / "trials.md").read_text()


def test_a_grid_is_one_table_the_last_axis_across(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(tmp_path, capsys)
    grid = list(csv.reader(io.StringIO((tmp_path / "grid.csv").read_text())))
    assert grid[0][:2] == ["loss", "n='1'"]
    assert [row[0] for row in grid[1:]] == ["ce", r"'it\'s $b'"]
    cells = dict(zip(grid[0], grid[1], strict=True))
    assert (cells["n='1'"], cells["n='2'"], cells["n='3'"]) == ("0.2", "failed", "0.4")
    cells = dict(zip(grid[0], grid[2], strict=True))
    assert (cells["n='1'"], cells["n='1' note"], cells["n='3'"]) == ("0.3", "epoch 2", "waiting")


def test_of_ablations_on_the_test_set_no_best_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = told(tmp_path, capsys, on="test")
    assert "nothing may be chosen by it" in out
    assert "the best" not in out
    found = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text())))
    assert [r["trial"] for r in found] == list("012345"), "in the file's order"


def test_each_trial_with_a_value_is_in_each_panel() -> None:
    made = space(parameters=PARAMETERS)
    canvas = drawn(SASREC, made, "val/all/ndcg@10", tried())
    svg = canvas.svg()
    # Three panels; a trial is a dot and a ring. The legend has boxes.
    assert svg.count("<circle") == 3 * 4 * 2
    assert svg.count("<polyline") > 0
    assert "loss" in svg
    assert "pruned, at its last epoch" in svg
    assert canvas.png().size == (1600, canvas.height * 2)
