"""What ``make slurm`` refuses because of what the cluster says, or because it cannot write it down."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from experiments import slurm, slurm_submit
from experiments.slurm_submit import longest
from tests.experiments.test_slurm import NAME, program
from tests.experiments.test_slurm_chain import Queue, finished, loaded, places, prepared

__all__ = ["places"]  # a fixture, used by every test

LIMITS = "main* 1:00:00\nlong infinite\nday 1-00:00:00\nodd n/a\n"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    return made


@pytest.mark.parametrize(
    ("partition", "seconds"),
    [
        (None, {"main": 3600}),
        ("day", {"day": 86400}),
        ("main,long", {"main": 3600, "long": None}),
        ("odd", {}),
        ("main,unknown", {}),
    ],
)
def test_limits_of_partitions_are_read(
    partition: str | None, seconds: dict[str, int | None]
) -> None:
    assert longest(LIMITS, partition) == seconds
    assert longest("day 1-00:00:00\n", None) == {}, "none is the default"


@pytest.mark.parametrize(
    ("options", "variables", "refused"),
    [
        ("time=1:00:01", {}, "TIME=1:00:01 is more than the partition allows (main gives 1:00:00 at"),
        ("time=60", {}, None),
        ("time=2-00:00:00 partition=main,day", {}, "(main gives 1:00:00, day gives 24:00:00 at most)"),
        ("time=2-00:00:00 partition=main,long", {}, None),
        ("time=2:00:00", {"SBATCH_PARTITION": "day"}, None),
        ("time=30", {"SBATCH_TIMELIMIT": "90"}, "TIME=90 is more than the partition allows"),
        ("time=2:00:00 qos=long", {}, None),  # it may give more than the partition does
    ],
)  # fmt: skip
def test_more_time_than_the_partition_gives_is_refused(
    queue: Queue, options: str, variables: dict[str, str], refused: str | None
) -> None:
    program(queue.folder / "sinfo", f"cat <<'END'\n{LIMITS}END")
    script = "".join(f"#SBATCH --{option}\n" for option in options.split())
    told = slurm_submit.too_long(script, variables)
    assert told is None if refused is None else refused in str(told)


def test_a_cluster_that_does_not_tell_its_limits_refuses_nothing(queue: Queue) -> None:
    program(queue.folder / "sinfo", "echo 'slurm_load_partitions: error' >&2; exit 1")
    assert slurm_submit.too_long("#SBATCH --time=9-00:00:00\n", {}) is None
    (queue.folder / "sinfo").unlink()
    assert slurm_submit.too_long("#SBATCH --time=9-00:00:00\n", {}) is None


def ask(monkeypatch: pytest.MonkeyPatch, *words: str, **variables: str) -> int:
    for name in ("SEEDS", "CHAIN", "TIME", "GPUS"):
        monkeypatch.setenv(name, variables.get(name, ""))
    return slurm.main([NAME, *words])


def test_a_job_is_not_submitted_beside_one_that_makes_the_same(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "sasrec.movielens_100k\n"
    assert ask(monkeypatch) == 0
    (queue.known / "1").write_text(name)
    # Other devices and another time make nothing else.
    assert ask(monkeypatch, GPUS="2", TIME="2:00:00") == 2
    told = capsys.readouterr().err
    assert "job 1 waits or runs already and makes the same (train, evaluate)" in told
    assert "scancel 1 first" in told
    assert ask(monkeypatch, SEEDS="0,3") == 2, "one of its seeds is that job's"
    assert ask(monkeypatch, "stages.train.module.dropout=0.4") == 0
    assert ask(monkeypatch, SEEDS="3,4") == 0
    (queue.known / "3_4").write_text(name)
    assert ask(monkeypatch, "seed=3") == 0, "of the array, that task has ended"
    capsys.readouterr()
    assert ask(monkeypatch, "seed=4") == 2
    assert "job 3_4 waits or runs" in capsys.readouterr().err
    # The chain leaves to the job what it makes; the rows without a model are nobody's yet.
    assert ask(monkeypatch, CHAIN="1") == 0
    told = capsys.readouterr().err
    assert "train: job 1 waits or runs already" in told
    assert "evaluate: job 1 waits or runs already" in told
    (queue.known / "1").unlink()
    assert ask(monkeypatch) == 0


def test_what_a_job_would_still_do_alone_is_no_reason_to_refuse_it(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another test of the same fit: the job waits for the fit, then has its own to do."""
    prepared(loaded())
    assert ask(monkeypatch) == 0
    (queue.known / "1").write_text("sasrec.movielens_100k\n")
    assert ask(monkeypatch, "split=valid") == 0
    finished(loaded(), "train", "evaluate", "reference")
    assert ask(monkeypatch) == 0, "it prints the table, and holds nothing for long"
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("chain", ["", "1"])
@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.EROFS, "read-only, or no rights"), (errno.ENOSPC, "the disk is full"), (errno.ENOTDIR, "")],
)  # fmt: skip
def test_a_runs_folder_that_cannot_be_written_is_told(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, told: str,
    chain: str, tmp_path: Path,
) -> None:  # fmt: skip
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert ask(monkeypatch, CHAIN=chain) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert str(tmp_path / "runs" / "slurm") in said
    assert (told or "cannot be written: Not a directory") in said
    assert queue.asked.read_text() == "", "nothing was submitted"
