"""What names a run folder, what does not, and what ``plan`` says about it."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import artifacts, config, lock, source_graph

BASIC = "sasrec/movielens_100k"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def planned(runs: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``planned(*overrides)``: stages by name, with the data taken as prepared (content "d1")."""

    def make(*overrides: str, digest: str = "d1") -> dict[str, Any]:
        experiment = config.load(BASIC, overrides)
        folder = tmp_path / "prepared"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text("{}")
        for name in experiment.stages:
            data = artifacts.stage_spec(experiment, name)["data"]
            artifacts.record_prepared(data, tmp_path / "cache", folder, digest)
        return {s.name: s for s in artifacts.plan(experiment, tmp_path / "cache")}

    return make


def keys(stages: dict[str, Any]) -> dict[str, str]:
    return {name: stage.key for name, stage in stages.items()}


def renamed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {n for n in before.keys() | after.keys() if keys(before).get(n) != keys(after).get(n)}


def finish(stage: Any, **changed: str) -> None:
    """What a finished stage leaves, without the run."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    done = {"sources": {**stage.sources, **changed}, "seconds": 3.2, "finished": "2026-01-02"}
    (stage.folder / "done.json").write_text(json.dumps(done))
    (stage.folder / "stage.json").write_text(json.dumps({"spec": stage.spec}))


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["++stages.train.module.dropout=0.55"], {"train", "evaluate"}),
        (["++stages.train.batch_size=77"], {"train", "evaluate"}),
        (["++stages.train.trainer.max_epochs=77"], {"train", "evaluate"}),
        (["++stages.train.select.metric=val/all/mrr"], {"train", "evaluate"}),
        (["seed=1"], {"train", "evaluate"}),
        (["data.mask_seen=false"], {"train", "evaluate", "reference"}),
        (["data.filters=[{_target_:datamodules.filters.KCore,user:5}]"], {"train", "evaluate", "reference"}),
        (["trainer.precision=bf16-mixed"], {"train", "evaluate", "reference"}),
        (["stages.reference.modules.markov=null"], {"reference"}),
        (["stages.evaluate.batch_size=7"], set()),  # a test draws and optimises nothing
        (["split=valid"], {"evaluate", "reference"}),
        (["++stages.reference.split=valid"], {"reference"}),
        (["launch.devices=8", "launch.micro_batch_size=2", "launch.strategy=ddp"], set()),
        (["launch.num_workers=3", "launch.threads=1", "launch.accelerator=cpu"], set()),
        (["logger=wandb"], set()),
        (["logger=tensorboard"], set()),
        (["+callbacks.x._target_=lightning.pytorch.Callback"], set()),
        (["data.root=/nowhere/at/all"], set()),
        (["data.on_bad_row=skip"], set()),
        (["data.expected=null"], set()),
    ],
)  # fmt: skip
def test_what_renames_a_stage(
    planned: Callable[..., dict[str, Any]], overrides: list[str], expected: set[str]
) -> None:
    assert renamed(planned(), planned(*overrides)) == expected


def test_the_data_count_by_content(planned: Callable[..., dict[str, Any]]) -> None:
    assert renamed(planned(), planned(digest="d2")) == {"train", "evaluate", "reference"}


def test_other_inputs_rename_what_reads_them(planned: Callable[..., dict[str, Any]]) -> None:
    last = planned("stages.evaluate.inputs.weights=train/last.ckpt")
    assert renamed(planned(), last) == {"evaluate"}


@pytest.mark.parametrize("mark", ["[1,2]", "{}", '{"sources": {'])
def test_a_damaged_mark_of_the_end_is_none(
    planned: Callable[..., dict[str, Any]], mark: str
) -> None:
    train = planned()["train"]
    finish(train)
    (train.folder / "done.json").write_text(mark)
    assert planned()["train"].state == "missing"
    (train.folder / "last.ckpt").write_bytes(b"")
    (train.folder / "stage.json").write_text(mark)  # what it began with is unknown: nothing changed
    cut = planned()["train"]
    assert (cut.state, cut.why) == ("partial", "was cut off: resumes from last.ckpt")
    # Nor is it the nearest run of another one.
    other = planned("++stages.train.module.dropout=0.4")["train"]
    assert (other.state, other.why) == ("missing", "never run")
    assert artifacts.output_digest(train.folder / "best.ckpt") is None


def shuffled(tree: Any, draw: random.Random) -> Any:
    if isinstance(tree, list):
        return [shuffled(v, draw) for v in tree]
    if not isinstance(tree, dict):
        return tree
    pairs = [(k, shuffled(v, draw)) for k, v in tree.items()]
    draw.shuffle(pairs)
    return dict(pairs)


SPEC = artifacts.stage_spec(config.load(BASIC), "train")


@given(st.integers(0, 10**6))
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_the_order_of_keys_does_not_matter(seed: int) -> None:
    spec = shuffled(copy.deepcopy(SPEC), random.Random(seed))
    assert artifacts.stage_key(spec, "d", {}) == artifacts.stage_key(SPEC, "d", {})


UNHASHED = ("run", "inputs", "select", "split", "data.root", "data.on_bad_row", "data.expected")
LEAVES = [k for k, _ in config.flatten(SPEC) if not k.startswith(UNHASHED)]


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_single_value_of_a_fit_counts(leaf: str) -> None:
    spec = copy.deepcopy(SPEC)
    *path, last = leaf.split(".")
    node = spec
    for part in path:
        node = node[part]
    node[last] = "changed"
    assert artifacts.stage_key(spec, "d", {}) != artifacts.stage_key(SPEC, "d", {})


# ---------------------------------------------------------------- states


def test_missing_done_partial_stale_running(planned: Callable[..., dict[str, Any]]) -> None:
    first = planned()
    assert {s.state for s in first.values()} == {"missing"}
    assert first["train"].why == "never run"
    assert first["evaluate"].why == "waits for train"
    first["train"].folder.mkdir(parents=True)
    (first["train"].folder / "last.ckpt").write_bytes(b"")
    assert planned()["train"].state == "partial"
    assert "last.ckpt" in planned()["train"].why
    finish(first["train"])
    assert planned()["train"].state == "done"
    assert planned()["evaluate"].why == "never run"
    finish(first["train"], **{"lightning_modules/sasrec/model.py": "other"})
    stale = planned()["train"]
    assert stale.state == "stale"
    assert "lightning_modules/sasrec/model.py" in stale.why
    assert "stale=rerun" in stale.why
    with lock.hold(stale.folder):
        running = planned()["train"]
        assert running.state == "running"
        assert str(os.getpid()) in running.why
        assert planned()["evaluate"].why == "never run" or "waits" in planned()["evaluate"].why


def test_unprepared_data_is_said_of_every_stage(runs: Path, tmp_path: Path) -> None:
    stages = artifacts.plan(config.load(BASIC), tmp_path / "empty")
    assert [(s.state, s.folder) for s in stages] == [("missing", None)] * 3
    assert all("not prepared" in s.why for s in stages)


def test_a_stage_with_data_of_its_own_waits_for_the_others(runs: Path, tmp_path: Path) -> None:
    """Evaluation on data that is prepared, of a training whose data is not."""
    other = "+stages.train.data={_target_:datamodules.movielens.MovieLensDataModule,release:1m}"
    experiment = config.load(BASIC, [other])
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    artifacts.record_prepared(experiment.config["data"], tmp_path / "cache", folder, "d1")
    stages = {s.name: s for s in artifacts.plan(experiment, tmp_path / "cache")}
    assert stages["train"].state == stages["evaluate"].state == "missing"
    assert "waits for train" in stages["evaluate"].why


def test_a_missing_stage_tells_how_it_differs_from_the_nearest_run(
    planned: Callable[..., dict[str, Any]],
) -> None:
    old = planned()
    finish(old["train"])
    why = planned("++stages.train.module.dropout=0.55")["train"].why
    assert old["train"].folder.name in why
    assert "dropout" in why
    assert "-> 0.55" in why


def test_inputs_are_the_folder_that_is_really_there(
    planned: Callable[..., dict[str, Any]], runs: Path
) -> None:
    train = planned()["train"]
    finish(train)
    kept = train.folder.rename(runs / f"my_best-{train.key}")
    after = planned()
    assert after["train"].state == "done"
    assert after["evaluate"].inputs == {"weights": str(kept / "best.ckpt")}


# ---------------------------------------------------------------- sources


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project of four files: module -> model -> types; and one that nobody imports."""
    files = {
        "lightning_modules/a/__init__.py": "from lightning_modules.a.module import A\n",
        "lightning_modules/a/module.py": (
            "def late():\n    from lightning_modules.a import model\nclass A: ...\n"
        ),
        "lightning_modules/a/model.py": "import os\nimport datamodules.types\nX = 1\n",
        "datamodules/types.py": "Y = 1\n",
        "lightning_modules/b.py": "Z = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source_graph, "REPO", tmp_path)
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    for function in vars(source_graph).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _digests() -> dict[str, str]:
    _forget()
    return source_graph.sources(("lightning_modules.a.A",))


def test_the_closure_follows_imports_late_ones_too(project: Path) -> None:
    assert set(_digests()) == {
        "lightning_modules/a/__init__.py", "lightning_modules/a/module.py",
        "lightning_modules/a/model.py", "datamodules/types.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "text", "changed"),
    [
        ("datamodules/types.py", "Y = 2\n", ["datamodules/types.py"]),
        ("datamodules/types.py", '"""What."""\n\n# Why.\nY  =  1  # how\n', []),
        ("lightning_modules/b.py", "Z = 2\n", []),
        ("lightning_modules/a/model.py", "import lightning_modules.b\nX = 1\n",
         ["datamodules/types.py", "lightning_modules/a/model.py", "lightning_modules/b.py"]),
    ],
)  # fmt: skip
def test_which_edit_makes_a_run_stale(
    project: Path, file: str, text: str, changed: list[str]
) -> None:
    before = _digests()
    (project / file).write_text(text)
    assert source_graph.changed_sources(before, _digests()) == changed


def test_a_long_list_of_files_is_cut_to_those_that_compute() -> None:
    files = ["callbacks/a.py", "datamodules/b.py", "lightning_modules/z.py", "experiments/c.py"]
    assert (
        source_graph.some_of(files, 4)
        == f"lightning_modules/z.py, {', '.join([*files[:2], files[3]])}"
    )
    assert source_graph.some_of(files, 2) == "lightning_modules/z.py, callbacks/a.py, 2 more"


def test_what_shows_results_makes_no_run_stale() -> None:
    _forget()
    made = source_graph.sources(("experiments.stage",))
    assert "experiments/trainers.py" in made
    assert not made.keys() & {
        "experiments/tracking.py", "experiments/plots.py", "experiments/charts.py",
        "experiments/loaded.py", "experiments/recommend.py", "experiments/crossover.py",
    }  # fmt: skip
    for name in source_graph.SHOWS:
        assert (source_graph.REPO / name).is_file()


def test_a_stage_depends_on_its_method_and_not_on_others(
    planned: Callable[..., dict[str, Any]],
) -> None:
    stages = planned()
    train, reference = stages["train"].sources, stages["reference"].sources
    assert set(train) >= {
        "lightning_modules/sasrec/model.py", "lightning_modules/losses.py",
        "datamodules/prepare.py", "datamodules/splits.py", "experiments/stage.py",
        "callbacks/checkpoints.py",
    }  # fmt: skip
    assert "lightning_modules/markov/model.py" in reference
    assert not {f for f in train if "markov" in f}
    assert not {f for f in reference if "sasrec" in f}


# ---------------------------------------------------------------- speed


def _children_seconds() -> float:
    """Of a processor, which others that run beside do not change."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_planning_answers_at_once_and_without_torch(
    command_environment: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    # A torch that cannot be imported: whoever tries is found out.
    (tmp_path / "torch.py").write_text("raise SystemExit('plan imported torch')\n")
    (tmp_path / "lightning.py").write_text("raise SystemExit('plan imported lightning')\n")
    environment = command_environment(tmp_path)
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    seconds = []
    for _ in range(2):
        started = _children_seconds()
        result = subprocess.run(
            [sys.executable, "-m", "experiments.run", "plan", BASIC],
            env=environment, cwd=artifacts.REPO, capture_output=True, text=True, check=False,
        )  # fmt: skip
        seconds.append(_children_seconds() - started)
        assert result.returncode == 0, result.stderr
    print(f"plan: {min(seconds):.2f} s")
    assert min(seconds) < 3  # 1 s on an idle machine
