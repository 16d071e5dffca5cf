"""``make slurm CHAIN=1``: which jobs there are, what each holds and waits for, and what is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.sources import cache_root
from experiments import artifacts, config, slurm, slurm_chain
from tests.experiments.test_slurm import NAME, Shell, program

ASKED = slurm.Request(gpus=2, nodes=2, tasks=2, time="12:00:00", lead=120)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))


def loaded(*overrides: str, name: str = NAME) -> config.Experiment:
    return config.load(name, overrides)


def prepared(experiment: config.Experiment) -> None:
    """As if its data had been prepared."""
    for number, data in enumerate(experiment.data_sets):
        folder = cache_root() / f"data{number}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        artifacts.record_prepared(data, cache_root(), folder, f"digest{number}")


def finished(experiment: config.Experiment, *names: str) -> None:
    for stage in artifacts.plan(experiment, cache_root()):
        if stage.name in names:
            assert stage.folder is not None
            stage.folder.mkdir(parents=True)
            digests = dict.fromkeys(stage.inputs)
            (stage.folder / "stage.json").write_text(
                json.dumps({"spec": stage.spec, "inputs_digest": digests})
            )
            done = {"seconds": 1, "finished": "now", "sources": stage.sources, "outputs": {}}
            (stage.folder / "done.json").write_text(json.dumps(done))


def chain(*experiments: config.Experiment, again: bool = False) -> dict[str, set[str]]:
    """The jobs by their files, with those that each waits for."""
    jobs = slurm_chain.planned(ASKED, experiments, again)
    return {job.file: {jobs[mark].file for mark in job.after} for job in jobs.values()}


def test_a_job_waits_for_what_its_stage_reads_and_for_nothing_else() -> None:
    experiment = loaded()
    assert chain(experiment) == {
        "data": set(), "train": {"data"}, "evaluate": {"train", "data"}, "reference": {"data"}
    }  # fmt: skip
    prepared(experiment)
    assert chain(experiment) == {"train": set(), "evaluate": {"train"}, "reference": set()}
    longer = chain(loaded(name="a_llmrec/movielens_100k"))
    assert longer["stage2"] == {"data", "backbone", "alignment"}
    assert longer["evaluate_backbone"] == {"data", "backbone"}


def test_what_is_done_has_no_job_unless_what_it_reads_is_made_anew() -> None:
    experiment = loaded()
    prepared(experiment)
    finished(experiment, "train", "reference")
    assert chain(experiment) == {"evaluate": set()}
    finished(experiment, "evaluate")
    assert chain(experiment) == {}
    assert chain(experiment, again=True) == {}, "nothing is stale"
    (train,) = (s.folder for s in artifacts.plan(experiment, cache_root()) if s.name == "train")
    assert train is not None
    note = json.loads((train / "done.json").read_text())
    (train / "done.json").write_text(json.dumps({**note, "sources": {"old.py": "1"}}))
    assert chain(experiment) == {}
    assert chain(experiment, again=True) == {"train": set(), "evaluate": {"train"}}


def test_seeds_share_what_no_seed_changes() -> None:
    seeds = [loaded(f"seed={seed}") for seed in (0, 7)]
    assert chain(*seeds) == {
        "data": set(), "reference.seed0": {"data"},
        "train.seed0": {"data"}, "evaluate.seed0": {"train.seed0", "data"},
        "train.seed7": {"data"}, "evaluate.seed7": {"train.seed7", "data"},
    }  # fmt: skip
    prepared(seeds[0])
    finished(seeds[1], "train")
    assert chain(*seeds) == {
        "train.seed0": set(), "evaluate.seed0": {"train.seed0"}, "reference.seed0": set(),
        "evaluate.seed7": set(),
    }  # fmt: skip


def test_a_stage_holds_its_own_devices_and_rows_without_a_model_none() -> None:
    own = "+stages.evaluate.launch={accelerator:cpu,devices:1,num_nodes:1}"
    experiment = loaded(own, "slurm.partition=gpu", "slurm.cpu_partition=cpu")
    asked = {name: slurm_chain.devices(ASKED, experiment, name) for name in experiment.stages}
    held = {name: (a.gpus, a.nodes, a.tasks) for name, a in asked.items()}
    assert held == {"train": (2, 2, 2), "evaluate": (0, 1, 1), "reference": (0, 1, 1)}
    texts = {
        name: slurm.script(asked[name], experiment, (), Path("/logs"), only=name)
        for name in experiment.stages
    }
    for name, text in texts.items():
        assert f"export LLMREC_STAGES={name}\n" in text
        assert f"#SBATCH --job-name=sasrec.movielens_100k.{name}\n" in text
        assert ("--gres" in text, "--partition=gpu" in text) == ((name == "train"),) * 2
        assert ("launch.devices=2" in text) == (name == "train")
    assert "#SBATCH --partition=cpu\n#" not in texts["train"]
    assert "#SBATCH --partition=cpu\n" in texts["reference"]
    # Where ARGS say what computes, that holds for every stage.
    everywhere = slurm_chain.devices(ASKED, loaded("launch.accelerator=gpu"), "reference")
    assert (everywhere.gpus, everywhere.nodes) == (2, 2)
    assert slurm_chain.devices(ASKED, loaded("launch.accelerator=cpu"), "train").gpus == 0


class Queue:
    """``sbatch``, which numbers jobs and notes its words, and ``squeue``, which knows those that are told."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.asked, self.known = folder, folder / "asked", folder / "known"
        self.asked.touch()
        program(
            folder / "sbatch",
            f'[[ $1 == --test-only ]] && exit 0\necho "$@" >> {self.asked}\nwc -l < {self.asked}',
        )
        program(folder / "squeue", f"cat {self.known}/${{2#--jobs=}} 2>/dev/null")
        self.known.mkdir()

    def submit(self, *words: str, **variables: str) -> tuple[list[str], str]:
        """What a chain hands to sbatch (options and script), and what it says."""
        before = len(self.asked.read_text().splitlines())
        done = subprocess.run(
            [sys.executable, "-m", "experiments.slurm", NAME, *words],
            env={**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "CHAIN": "1", **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = self.asked.read_text().splitlines()[before:]
        return [" ".join(Path(w).name for w in line.split()[1:]) for line in lines], done.stderr


def test_the_chain_is_submitted_and_again_what_is_missing_then(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "bin")
    experiment = loaded()
    prepared(experiment)
    kill = "--kill-on-invalid-dep=yes"
    asked, told = queue.submit()
    assert asked == ["train.sh", f"--dependency=afterok:1 {kill} evaluate.sh", "reference.sh"]
    assert "evaluate: job 2 behind 1" in told
    assert "the jobs behind it are cancelled" in told
    # The fit failed, its test was cancelled; the rows without a model still wait for a processor.
    (queue.known / "3").write_text("sasrec.movielens_100k.reference\n")
    asked, told = queue.submit(TIME="2:00:00")
    assert asked == ["train.sh", f"--dependency=afterok:4 {kill} evaluate.sh"]
    assert "reference: job 3 waits or runs already" in told
    # Another cluster's job has the number of ours.
    (queue.known / "4").write_text("somebody.else\n")
    finished(experiment, "reference")
    asked, _ = queue.submit()
    assert asked == ["train.sh", f"--dependency=afterok:6 {kill} evaluate.sh"]
    finished(experiment, "train", "evaluate")
    asked, told = queue.submit()
    assert (asked, "every stage is done" in told) == ([], True)


def test_a_dry_run_prints_every_script_with_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {"CHAIN": "1", "DRY": "1", "PATH": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    assert slurm.main([NAME]) == 0
    told = capsys.readouterr().out
    assert told.count("#!/bin/bash") == 4
    waits = "# sbatch --dependency=afterok:train:data --kill-on-invalid-dep=yes evaluate.sh\n"
    assert waits in told
    assert "experiments.run data sasrec/movielens_100k" in told
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_somebody_runs_is_not_submitted_twice() -> None:
    from experiments import lock
    from experiments.errors import UserError

    experiment = loaded()
    prepared(experiment)
    (train,) = (s.folder for s in artifacts.plan(experiment, cache_root()) if s.name == "train")
    assert train is not None
    with lock.hold(train), pytest.raises(UserError, match="being run by process"):
        slurm_chain.planned(ASKED, [experiment], False)


@pytest.mark.parametrize(("status", "told"), [(0, False), (2, True), (75, False)])
def test_a_job_that_fails_says_how_the_chain_goes_on(
    tmp_path: Path, status: int, told: bool
) -> None:
    shell = Shell(tmp_path)
    experiment = loaded(shell.driver(f"exit {status}"))
    script = slurm.script(ASKED, experiment, (), tmp_path, only="train")
    program(tmp_path / "sleep", "kill -9 $PPID")  # queued again: Slurm ends the shell here
    process = shell.start(script)
    _, said = process.communicate(timeout=20)
    line = "make slurm NAME=sasrec/movielens_100k CHAIN=1 ... submits what is missing"
    assert (line in said) == told
    assert ("error: train did not end well" in said) == told
