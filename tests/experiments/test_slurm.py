"""The batch script of ``make slurm``: what it asks for, what it survives, and what is refused before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from callbacks import stop_request
from experiments import config, frame, launchers, slurm, slurm_time
from experiments.errors import UserError

NAME = "sasrec/movielens_100k"
ASKED = slurm.Request(gpus=2, nodes=2, tasks=2, time="12:00:00", lead=120)


def written(
    folder: Path, *overrides: str, asked: slurm.Request = ASKED, seeds: tuple[int, ...] = ()
) -> str:
    return slurm.script(asked, config.load(NAME, [*overrides]), seeds, folder)


def program(file: Path, text: str) -> Path:
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return file


class Shell:
    """Runs a script with a driver, ``scontrol`` and ``sleep`` of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requeued, self.words = folder / "requeued", folder / "words"
        program(folder / "scontrol", f'echo "$@" >> {self.requeued}')
        program(folder / "sleep", "exit 0")

    def driver(self, text: str) -> str:
        """The override that makes bash run ``text`` where the interpreter would run."""
        return f"slurm.python={program(self.folder / 'driver', text)}"

    def start(self, script: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "17",
            **variables,
        }
        (self.folder / "job.sh").write_text(script)
        return subprocess.Popen(
            ["bash", str(self.folder / "job.sh")],
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, **variables: str) -> int:
        process = self.start(script, **variables)
        process.communicate(timeout=20)
        return process.returncode


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


# ---------------------------------------------------------------- what it asks for


def test_tasks_are_devices_and_the_signal_goes_to_the_shell(tmp_path: Path) -> None:
    lines = written(tmp_path, "seed=3").splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in ("nodes=2", "ntasks-per-node=2", "gres=gpu:2", "time=12:00:00", "requeue"):
        assert f"#SBATCH --{option}" in lines
    assert "#SBATCH --signal=B:USR1@120" in lines
    assert f"#SBATCH --output={tmp_path}/%j.log" in lines
    words = [line.strip(" \\&") for line in lines if line.startswith("    ")]
    assert {"seed=3", "launch.devices=2", "launch.num_nodes=2"} <= set(words)
    assert {"launch.accelerator=gpu", "launch.strategy=ddp"} <= set(words)


def test_a_cluster_without_gpus_and_a_site(tmp_path: Path) -> None:
    asked = slurm.Request(gpus=0, nodes=1, tasks=3, time="60", lead=30)
    site = (
        "slurm.account=me",
        "slurm.cpus_per_task=4",
        "slurm.modules=[cuda/12]",
        "slurm.memory=8G",
    )
    text = written(tmp_path, *site, asked=asked)
    assert "gres" not in text
    for line in ("--account=me", "--cpus-per-task=4", "--mem=8G", "--ntasks-per-node=3"):
        assert f"#SBATCH {line}\n" in text
    assert "module load cuda/12\n" in text
    assert "launch.accelerator=cpu" in text
    assert "launch.threads=4" in text


def test_seeds_are_an_array_with_a_log_each(tmp_path: Path) -> None:
    text = written(tmp_path, seeds=(0, 1, 2))
    assert "#SBATCH --array=0-2\n" in text
    assert f"#SBATCH --output={tmp_path}/%A_%a.log\n" in text
    assert '"seed=$SLURM_ARRAY_TASK_ID"' in text
    assert "#SBATCH --array=0,7\n" in written(tmp_path, seeds=(0, 7))


NASTY = '/tmp/it\'s $HOME; `touch pwned` $(touch pwned)\n"q" \\ *'


def test_words_reach_the_driver_as_they_were_given(shell: Shell) -> None:
    driver = shell.driver(f'printf "%s\\0" "$@" > {shell.words}')
    override = config.as_text(f"data.root={NASTY}")
    script = written(shell.folder, override, driver, seeds=(0, 1))
    assert shell.run(script, SLURM_ARRAY_TASK_ID="1", NAME="other", SEEDS="9") == 0
    words = shell.words.read_text().split("\0")[:-1]
    assert words[:4] == ["-m", "experiments.run", "exp", NAME]
    assert override in words
    assert words[-1] == "seed=1"
    assert config.load(NAME, words[4:]).config["data"]["root"] == NASTY
    assert not list(Path.cwd().glob("pwned")) + list(shell.folder.glob("pwned"))


# ---------------------------------------------------------------- what it survives


@pytest.mark.parametrize(
    ("status", "variables", "requeued"),
    [
        (0, {}, ""),
        (2, {}, ""),
        (137, {}, ""),  # killed, but nobody asked it to stop
        (75, {}, "requeue 17"),
        (75, {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "4"}, "requeue 16_4"),
        (75, {"SLURM_RESTART_COUNT": "100"}, ""),
    ],
)
def test_it_queues_again_where_the_driver_stopped_as_asked(
    shell: Shell, status: int, variables: dict[str, str], requeued: str
) -> None:
    script = written(shell.folder, shell.driver(f"exit {status}"))
    assert shell.run(script, **variables) == status
    told = shell.requeued.read_text().strip() if shell.requeued.exists() else ""
    assert told == requeued


@pytest.mark.parametrize("listens", [True, False])
def test_a_signal_is_passed_on_even_to_a_driver_that_does_not_listen_yet(
    shell: Shell, listens: bool
) -> None:
    trap = f"trap 'exit {stop_request.STATUS}' USR1" if listens else ""
    ready = shell.folder / "ready"
    text = f"{trap}\ntouch {ready}\nfor _ in $(seq 200); do /bin/sleep 0.05; done"
    process = shell.start(written(shell.folder, shell.driver(text)))
    deadline = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == (stop_request.STATUS if listens else 128 + signal.SIGUSR1)
    assert shell.requeued.read_text().strip() == "requeue 17"


def test_what_a_site_sets_up_may_read_and_set_any_variable_and_be_interrupted(shell: Shell) -> None:
    setup = 'slurm.setup=["echo $nobody_sets_this","status=1 driver=1","kill -USR1 $$"]'
    driver = shell.driver("exit 0")
    assert shell.run(written(shell.folder, setup, driver)) == stop_request.STATUS
    assert shell.requeued.read_text().strip() == "requeue 17"
    quiet = setup.replace(',"kill -USR1 $$"', "")
    assert shell.run(written(shell.folder, quiet, driver)) == 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"GPUS": "-1"}, "GPUS='-1', expected a whole number"),
        ({"GPUS": "two"}, "GPUS='two'"),
        ({"NODES": "0"}, "NODES='0', expected a whole number of at least 1"),
        ({"GPUS": "2", "TASKS": "3"}, "leave TASKS out"),
        ({"TIME": "noon"}, "TIME='noon', expected hours"),
        ({"TIME": "0"}, "no time at all"),
        ({"TIME": "3", "LEAD": "120"}, "LEAD=120"),
        ({"TIME": "1:00:00", "LEAD": "7200"}, "queue for ever"),
        ({"NAME": "sasrec/movielens_100"}, "did you mean 'sasrec/movielens_100k'"),
        ({"NAME": "x; touch pwned"}, "no experiment is called"),
        ({"NAME": ""}, "NAME is missing"),
        ({"ARGS": "stages.train.modul.dropout=1"}, "unknown key"),
        ({"ARGS": "launch.devices=4"}, "give GPUS="),
        ({"ARGS": "+stages.train.launch={devices:4}"}, "more than the job has"),
        ({"ARGS": "slurm.qos='a b'"}, "cannot stand in a batch script"),
        ({"ARGS": "slurm.modules=cuda"}, "slurm.modules is 'cuda', expected a list: [cuda]"),
        ({"SEEDS": "x"}, "SEEDS='x'"),
        ({"SEEDS": "2", "ARGS": "seed=1"}, "exclude each other"),
        ({"PATH": "/nowhere"}, "sbatch is not here"),
    ],
)
def test_a_bad_request_is_refused_before_it_is_submitted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    words: str,
) -> None:
    for name, value in {"NAME": NAME, **variables}.items():
        monkeypatch.setenv(name, value)
    assert slurm.main([]) == 2
    assert words in capsys.readouterr().err


def test_a_sites_file_without_some_keys_is_told() -> None:
    told = [p for p in frame.structure_problems({"slurm": {"account": "me"}}) if "slurm" in p]
    assert len(told) == 1
    assert told[0].startswith("slurm lacks partition, qos,")


def test_a_dry_run_prints_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DRY", "1")
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.main([NAME]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [
        ("10", 600), ("10:30", 630), ("12:00:00", 43200), ("1-00", 86400), ("1-02:30", 95400),
        ("2-12:00:05", 216005),
    ],
)  # fmt: skip
def test_times_are_read_as_sbatch_reads_them(time_limit: str, seconds: int) -> None:
    assert slurm_time.seconds_of(time_limit) == seconds


# ---------------------------------------------------------------- steps


def test_a_step_has_the_devices_of_its_stage() -> None:
    launch = {"num_nodes": 2, "devices": 4, "accelerator": "gpu"}
    job = {launchers.SRUN: "--container-image='a b'", "SLURM_CPUS_PER_TASK": "8"}
    words = launchers.command("experiments.stage", ["folder"], launch, job)
    own = [sys.executable, "-m", "experiments.stage", "folder"]
    assert words[0] == "srun"
    assert words[-len(own) :] == own
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--gres=gpu:4"} <= set(words)
    assert {"--cpus-per-task=8", "--container-image=a b", "--kill-on-bad-exit=1"} <= set(words)
    small = launchers.command("m", [], {"num_nodes": 1, "devices": 1, "accelerator": "cpu"}, job)
    assert {"--ntasks=1", "--gres=none"} <= set(small)
    # Whatever the job has: with none of its GPUs a stage would silently run on the CPU.
    found = launchers.command("m", [], {**launch, "accelerator": "auto"}, job)
    assert not [word for word in found if "gres" in word]
    assert launchers.command("m", [], None, job) == [sys.executable, "-m", "m"]
    assert launchers.command("m", [], launch, {}) == [sys.executable, "-m", "m"]


@pytest.mark.parametrize(
    ("inside", "asked", "stops", "begun"),
    [
        (True, False, 2, 3),  # a step that Slurm ends late, meaning an earlier attempt's
        (True, True, 9, 1),  # the job makes room
        (False, False, 9, 1),
        (True, False, 9, launchers.STEPS),
    ],
)
def test_a_step_that_is_ended_alone_is_begun_again_in_the_same_job(
    monkeypatch: pytest.MonkeyPatch, inside: bool, asked: bool, stops: int, begun: int
) -> None:
    monkeypatch.setattr(launchers, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(stop_request, "asked", lambda: asked)
    steps: list[int] = []

    def work() -> None:
        steps.append(len(steps))
        if len(steps) <= stops:
            raise stop_request.Stopped

    environment = {launchers.SRUN: ""} if inside else {}
    if stops < launchers.STEPS:
        launchers.until_done(work, environment)
    else:
        with pytest.raises(stop_request.Stopped):
            launchers.until_done(work, environment)
    assert len(steps) == begun


def cluster(**variables: str) -> list[Any]:
    from experiments.trainers import cluster

    names = {"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    return list(cluster({"num_nodes": 1, "devices": 2}, {**names, **variables}))


def test_other_tasks_than_devices_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    (found,) = cluster(**{launchers.STEP: "1"})
    assert not found.auto_requeue
    with pytest.raises(UserError, match="GPUS=2 NODES=1"):
        cluster(**{launchers.STEP: "1", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"})
    # Inside a job, but not started by srun: Lightning would wait for tasks that nobody starts.
    (local,) = cluster()
    assert type(local).__name__ == "LightningEnvironment"
