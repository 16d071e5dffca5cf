"""``make slurm`` on a real cluster: several ranks, two nodes, preemption, arrays, cancelling, refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPO
from tests.slurm.cluster import Cluster, cluster, missing, wait_until

NAME = "sasrec/movielens_100k"
EPOCHS, STEPS, BATCH = 3, 21, 14  # of which the 98 rows make seven, none of them filled up
REASON = missing()
if REASON and os.environ.get("LLMREC_NEED_SLURM"):
    raise RuntimeError(f"LLMREC_NEED_SLURM is set, but {REASON}")
pytestmark = [
    pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON or ""),
]  # fmt: skip

Environment = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster_runs")


@pytest.fixture(scope="module")
def here(command_environment: Environment, runs: Path) -> Iterator[Cluster]:
    with cluster(command_environment(runs)) as made:
        yield made


@pytest.fixture(scope="module")
def fitted(tiny: list[str]) -> list[str]:
    """The fit alone, without dropout, of which every rank draws its own."""
    left_out = ("~stages.evaluate", "~stages.reference")
    own = ("++stages.train.module.dropout=0.0", f"++stages.train.batch_size={BATCH}")
    return [*(w for w in tiny if "batch_size" not in w), *left_out, *own]


@pytest.fixture(scope="module")
def expected(
    run_command: Callable[..., Any], fitted: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the same fit in one process, that nobody interrupted; its test lies beside it."""
    alone = tmp_path_factory.mktemp("alone")
    done = run_command("exp", NAME, *tested(fitted), runs=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder(alone, "sasrec.train")


def tested(fitted: list[str]) -> list[str]:
    return [word for word in fitted if word != "~stages.evaluate"]


def folder(runs: Path, begins: str) -> Path:
    (found,) = runs.glob(f"{begins}-*")
    return found


def ask(here: Cluster, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``make slurm``, as the Makefile starts it."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.slurm", NAME, *words],
        cwd=REPO, env={**here.environment, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def submit(here: Cluster, *words: str, **variables: str) -> str:
    """The job's number."""
    done = ask(here, *words, **{"TIME": "20", **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log(runs: Path, job: str) -> str:
    return "\n".join(f.read_text() for f in (runs / "slurm").glob(f"*/{job}*.log"))


def watch(place: Path, rank: int | None = None, seconds: float = 0.5) -> list[str]:
    """Slow down from a step of the second epoch on, say when that is, and note what is learned from."""
    place.mkdir()
    slow = f"step:9,note:{place}/note,seconds:{seconds},until:{place}/over"
    slow += "" if rank is None else f",rank:{rank}"
    return [
        f"+callbacks.linger={{_target_:faults.Linger,{slow}}}",
        f"+callbacks.rows={{_target_:faults.RowsLog,folder:{place}}}",
    ]


def require_same(trained: Path, expected: Path, place: Path) -> None:
    """Every row once an epoch over all ranks and attempts, and the outcome of the uninterrupted fit."""
    lines = [json.loads(line) for f in place.glob("*.jsonl") for line in f.read_text().splitlines()]
    learned = Counter((epoch, row) for epoch, rows in lines for row in rows)
    count = 1 + max(row for _, row in learned)
    assert count / BATCH * EPOCHS == STEPS
    assert learned == Counter((epoch, row) for epoch in range(EPOCHS) for row in range(count))
    ours, theirs = (
        json.loads((f / "done.json").read_text())["results"] for f in (trained, expected)
    )
    assert ours["epochs"] == theirs["epochs"] == EPOCHS
    (value,) = ours["selected"].values()
    assert [value] == pytest.approx(list(theirs["selected"].values()), abs=1e-6)
    ours, theirs = (torch.load(f / "last.ckpt", weights_only=True) for f in (trained, expected))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    # A key's bias moves no attention: its gradient is rounding alone, which Adam makes as large as any.
    weights = {n: w for n, w in theirs["state_dict"].items() if not n.endswith("bias")}
    assert len(weights) > 5
    for name, weight in weights.items():
        torch.testing.assert_close(ours["state_dict"][name], weight, atol=1e-4, rtol=1e-4)


def processes(word: str) -> list[str]:
    """Command lines that contain a word."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in text:
            found.append(text)
    return found


def test_what_the_cluster_cannot_give_is_refused_at_once(here: Cluster, fitted: list[str]) -> None:
    for asked in ({"GPUS": "3"}, {"NODES": "3"}):
        done = ask(here, *fitted, **asked)
        assert done.returncode == 2
        assert "sbatch refused" in done.stderr
    long = ask(here, *fitted, GPUS="1", TIME="1:00:01")
    assert long.returncode == 2, "the partition gives 60 minutes"
    assert "TIME=1:00:01 is more than the partition allows (main gives 1:00:00" in long.stderr
    dry = ask(here, *fitted, DRY="1")
    assert dry.stdout.startswith("#!/bin/bash")
    assert here.ask("squeue", "-h") == ""


def test_one_node_two_ranks_cancelled_and_submitted_again(
    here: Cluster, runs: Path, fitted: list[str], expected: Path, tmp_path: Path
) -> None:
    words = [*fitted, *watch(tmp_path / "seen")]
    first = submit(here, *words, GPUS="2")
    assert wait_until((tmp_path / "seen" / "note").exists, 120), log(runs, first)
    twice = ask(here, *words, GPUS="1", TIME="15")
    assert twice.returncode == 2
    assert f"job {first} waits or runs already" in twice.stderr
    here.ask("scancel", first)
    assert here.ended(first, 60) == "CANCELLED"
    trained = folder(runs, "sasrec.train")
    assert wait_until(lambda: not processes(str(trained)), 20), processes(str(trained))
    saved = torch.load(trained / "last.ckpt", weights_only=True)["global_step"]
    assert 9 <= saved < 14, "inside the second epoch"
    second = submit(here, *words, GPUS="2")
    assert here.ended(second, 180) == "COMPLETED", log(runs, second)
    assert "resuming" in log(runs, second)
    assert json.loads((trained / "done.json").read_text())["devices"] == 2
    require_same(trained, expected, tmp_path / "seen")


def test_two_nodes_two_ranks_each_preempted_twice(
    here: Cluster, runs: Path, fitted: list[str], expected: Path, tmp_path: Path
) -> None:
    """With a rank that lags behind, two signals in a row, and a signal while the second attempt imports."""
    own = tmp_path / "runs"
    words = [*tested(fitted), *watch(tmp_path / "seen", rank=1)]
    job = submit(here, *words, GPUS="2", NODES="2", LLMREC_RUNS=str(own))
    assert wait_until((tmp_path / "seen" / "note").exists, 180), log(own, job)
    for _ in range(2):
        here.ask("scancel", "--batch", "--signal=USR1", job)
    assert wait_until(lambda: here.job(job).get("Restarts") == "1", 60), log(own, job)
    assert wait_until(lambda: bool(here.steps(job)), 90), log(own, job)
    time.sleep(0.5)
    here.ask("scancel", "--batch", "--signal=USR1", job)
    assert wait_until(lambda: here.job(job).get("Restarts") == "2", 90), log(own, job)
    assert here.ended(job, 420) == "COMPLETED", log(own, job)
    told = log(own, job)
    assert told.count("stopped as asked") >= 2
    assert told.count("resuming") == 2
    trained = folder(own, "sasrec.train")
    assert json.loads((trained / "done.json").read_text())["devices"] == 4
    require_same(trained, expected, tmp_path / "seen")
    ours, theirs = metrics(own), metrics(expected.parent)
    assert len(theirs) > 20
    assert ours == pytest.approx(theirs, abs=1e-6)


def metrics(runs: Path) -> dict[str, float]:
    """Of the test, all groups."""
    row = json.loads((folder(runs, "sasrec.evaluate") / "metrics.json").read_text())["rows"]
    return {
        name: told["value"] for name, told in row["evaluate"].items() if told["value"] is not None
    }


def test_before_its_time_is_over_a_job_saves_and_goes_on_on_another_node(
    here: Cluster, fitted: list[str], expected: Path, tmp_path: Path
) -> None:
    """Slurm's own signal, LEAD seconds before the limit or up to a minute earlier: it takes that long."""
    own, seen = tmp_path / "runs", tmp_path / "seen"
    words = [*fitted, *watch(seen, seconds=10.0)]
    limits = {"TIME": "2", "LEAD": "30"}
    job = submit(here, *words, GPUS="1", LLMREC_RUNS=str(own), **limits)
    assert wait_until((seen / "note").exists, 60), log(own, job)
    first = here.job(job)["BatchHost"]
    here.ask("scontrol", "update", f"nodename={first}", "state=drain", "reason=test")
    try:
        assert wait_until(lambda: here.job(job).get("Restarts") == "1", 150), log(own, job)
        (seen / "over").touch()
        assert here.ended(job, 120) == "COMPLETED", log(own, job)
    finally:
        here.ask("scontrol", "update", f"nodename={first}", "state=resume")
    told = log(own, job)
    assert told.count("stopped as asked") >= 1
    assert told.count("resuming") == 1
    assert "TIME LIMIT" not in told
    assert {first, here.job(job)["BatchHost"]} == {"node1", "node2"}
    require_same(folder(own, "sasrec.train"), expected, seen)


def test_a_chain_outlives_a_preempted_stage_and_ends_behind_one_that_fails(
    here: Cluster, tiny: list[str], tmp_path: Path
) -> None:
    own = tmp_path / "runs"
    asked = {"GPUS": "2", "CHAIN": "1", "TIME": "20", "LLMREC_RUNS": str(own)}

    def chain(fault: str) -> dict[str, str]:
        """The numbers of its jobs by stage."""
        done = ask(here, *tiny, f"+callbacks.fault={{_target_:faults.{fault}}}", **asked)
        assert done.returncode == 0, done.stderr
        jobs = dict(re.findall(r"^  (\w+): job (\d+)", done.stderr, re.MULTILINE))
        assert set(done.stdout.split()) <= set(jobs.values())
        return jobs

    failing = chain("NoPackage,name:no_such_package")
    assert here.ended(failing["evaluate"], 120) == "CANCELLED"
    assert here.state(failing["train"]) == "FAILED"
    told = log(own, failing["train"])
    assert "the package no_such_package is not installed" in told
    assert "make slurm NAME=sasrec/movielens_100k CHAIN=1 ... submits what is missing" in told
    assert here.ended(failing["reference"], 120) == "COMPLETED", log(own, failing["reference"])
    texts = {f.stem: f.read_text() for f in own.glob("slurm/*/*.sh")}
    assert "--ntasks-per-node=2\n" in texts["train"]
    assert not any("--gres" in text for text in texts.values()), "ARGS say that all compute on CPUs"

    note = tmp_path / "note"
    jobs = chain(f"Linger,step:9,note:{note},until:{tmp_path}/over")
    assert set(jobs) == {"train", "evaluate"}
    assert wait_until(note.exists, 120), log(own, jobs["train"])
    assert here.job(jobs["evaluate"])["Reason"] == "Dependency"
    again = chain(f"Linger,step:9,note:{note}")
    assert again == jobs, "what is queued is not queued twice"
    here.ask("scancel", "--signal=TERM", f"{jobs['train']}.0")  # the step, not the job
    goes_on = "the step was told to end, this job was not"
    assert wait_until(lambda: goes_on in log(own, jobs["train"]), 60), log(own, jobs["train"])
    assert wait_until(lambda: here.steps(jobs["train"]) == [f"{jobs['train']}.1"], 60)
    assert here.job(jobs["train"])["Restarts"] == "0"
    here.ask("scancel", "--batch", "--signal=USR1", jobs["train"])
    assert wait_until(lambda: here.job(jobs["train"]).get("Restarts") == "1", 120)
    (tmp_path / "over").touch()
    for name in ("train", "evaluate"):
        assert here.ended(jobs[name], 180) == "COMPLETED", log(own, jobs[name])
    assert "resuming" in log(own, jobs["train"])
    assert len(metrics(own)) > 20
    done = ask(here, *tiny, **asked)
    assert "every stage is done" in done.stderr


def test_seeds_are_an_array_that_shares_what_no_seed_changes(
    here: Cluster, tiny: list[str], tmp_path: Path
) -> None:
    own = tmp_path / "runs"
    words = [*tiny, "~stages.evaluate", "++stages.train.trainer.max_epochs=1"]
    job = submit(here, *words, GPUS="0", SEEDS="2", LLMREC_RUNS=str(own))
    alone = ask(here, *words, "seed=1", GPUS="0", TIME="20", LLMREC_RUNS=str(own))
    assert f"job {job}_1 waits or runs already" in alone.stderr
    for seed in (0, 1):
        assert here.ended(f"{job}_{seed}", 240) == "COMPLETED", log(own, job)
    specs = [json.loads((f / "stage.json").read_text())["spec"] for f in own.glob("sasrec.train-*")]
    assert sorted(spec["seed"] for spec in specs) == [0, 1]
    assert (folder(own, "reference") / "done.json").is_file()
    assert len(list((own / "slurm").glob(f"*/{job}_[01].log"))) == 2


def test_trials_of_a_sweep_are_an_array_that_shares_them(
    here: Cluster, tiny: list[str], tmp_path: Path
) -> None:
    own, file = tmp_path / "runs", tmp_path / "space.yaml"
    file.write_text(
        "sampler: grid\nmetric: ndcg@10\nparameters: {stages.train.module.dropout: [0.0, 0.2]}\n"
    )
    asked = {"SPACE": str(file), "GPUS": "0", "TIME": "20", "LLMREC_RUNS": str(own)}

    def sweep(**variables: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "experiments.sweep", NAME, *tiny]
        return subprocess.run(
            words, cwd=REPO, env={**here.environment, **asked, **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    submitted = sweep(SLURM="1", JOBS="1")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    logs = "\n".join
    for task in (0, 1):
        state = here.ended(f"{job}_{task}", 300)
        assert state == "COMPLETED", logs(f.read_text() for f in own.glob("sweeps/*/slurm/*.log"))
    script = next(own.glob("sweeps/*/slurm/job.sh")).read_text()
    assert "#SBATCH --array=0-1%1" in script
    table = sweep(N="0")
    assert table.returncode == 0, table.stderr
    assert "2 trials (2 done)" in table.stdout
    assert len(list(own.glob("sasrec.train-*/done.json"))) == 2
    assert "all trials were begun" in sweep(SLURM="1").stderr
