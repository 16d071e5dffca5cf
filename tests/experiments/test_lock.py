"""One driver per folder: refused while its holder lives, taken over when it died, whatever is in the file."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import lock
from experiments.errors import UserError

REPO = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from experiments import lock
with lock.hold(Path(sys.argv[1])) as messages:
    print("held", *messages, flush=True)
    time.sleep(60)
"""


# Where this process is, read from where proc(5), namespaces(7) and machine-id(5) have it.
PLACE = {
    "host": socket.gethostname(),
    "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    "pids": os.readlink("/proc/self/ns/pid"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sasrec.train-abc"


@pytest.fixture
def other(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=REPO, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("held")
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def no_endless_loop() -> Iterator[None]:
    """Taking a lock must never spin: 10 seconds, then the test fails."""

    def stop(*unused: object) -> None:
        pytest.fail("lock.hold did not come to an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(folder: Path, **note: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "pid": os.getpid(),
        "start": own_start(),
        **PLACE,
        "since": "then",
    }
    (folder / lock.NAME).write_text(json.dumps({**whole, **note}))


def own_start(pid: int | str = "self") -> str:
    """Field 22 of proc(5), counted by hand."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[22 - 3]


def test_a_free_folder_is_held_and_given_back(folder: Path) -> None:
    assert lock.holder(folder) is None
    with lock.hold(folder) as messages:
        assert messages == []
        assert lock.holder(folder) == f"being run by process {os.getpid()}"
        note = json.loads((folder / lock.NAME).read_text())
        assert note["start"] == own_start()
    assert list(folder.iterdir()) == []


def test_it_is_given_back_after_an_error(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.hold(folder):
        _ = 1 // 0
    assert list(folder.iterdir()) == []


def test_a_living_holder_is_refused(folder: Path, other: subprocess.Popen[str]) -> None:
    assert lock.holder(folder) == f"being run by process {other.pid}"
    with pytest.raises(UserError, match=rf"run by process {other.pid}; wait"), lock.hold(folder):
        pass
    assert lock.holder(folder) is not None, "a refused driver must leave the lock alone"


def test_a_killed_holder_is_taken_over_with_a_message(
    folder: Path, other: subprocess.Popen[str]
) -> None:
    other.kill()
    other.wait()
    assert lock.holder(folder) is None
    with lock.hold(folder) as messages:
        assert len(messages) == 1
        assert f"took over from process {other.pid}" in messages[0]
    assert list(folder.iterdir()) == []


def test_a_reused_pid_is_not_its_former_owner(folder: Path) -> None:
    write(folder, pid=os.getpid(), start=str(int(own_start()) - 1))
    assert lock.holder(folder) is None
    with lock.hold(folder) as messages:
        assert f"took over from process {os.getpid()}" in messages[0]


def test_another_host_is_believed_to_be_alive(folder: Path) -> None:
    write(folder, host="node17", pid=4)
    said = lock.holder(folder)
    assert said is not None
    assert "process 4 on node17" in said
    assert str(folder / lock.NAME) in said, "the user must learn what to delete"
    with pytest.raises(UserError, match="node17"), lock.hold(folder):
        pass


def test_a_living_stage_process_of_a_dead_driver_holds_on(
    folder: Path, other: subprocess.Popen[str]
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write(folder, pid=dead.pid, start="1")
    (folder / lock.NAME).write_text(
        json.dumps({**json.loads((folder / lock.NAME).read_text()), "child": other.pid,
                    "child_start": own_start(other.pid)})
    )  # fmt: skip
    assert lock.holder(folder) is not None
    other.kill()
    other.wait()
    assert lock.holder(folder) is None


def test_the_child_is_noted_beside_its_driver(folder: Path, other: subprocess.Popen[str]) -> None:
    mine = folder.with_name("mine")
    with lock.hold(mine):
        lock.add_child(mine, other.pid)
        note = json.loads((mine / lock.NAME).read_text())
    assert (note["child"], note["child_start"]) == (other.pid, own_start(other.pid))
    assert note["pid"] == os.getpid()
    assert list(mine.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", '{"pid": 12', "[]", "null", "12"])
def test_a_torn_lock_file_is_no_holder(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / lock.NAME).write_text(content)
    assert lock.holder(folder) is None
    with lock.hold(folder):
        assert lock.holder(folder) == f"being run by process {os.getpid()}"
    assert list(folder.iterdir()) == []


RACE = """
import sys, time
from pathlib import Path
from experiments import lock
from experiments.errors import UserError
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with lock.hold(Path(sys.argv[1])):
        print("won", flush=True)
        time.sleep(1)
except UserError:
    print("lost", flush=True)
"""


def test_of_several_that_take_over_at_once_one_wins(folder: Path) -> None:
    write(folder, start="1")  # a dead holder's
    at = str(time.time() + 1.5)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(folder), at], cwd=REPO, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    results = [racer.communicate(timeout=9) for racer in racers]
    assert sorted(out.strip() for out, _ in results) == ["lost", "lost", "lost", "won"], results


def hold_by_a_job_elsewhere(folder: Path) -> None:
    """A lock of job 17 of cluster a, on another node."""
    folder.mkdir(parents=True)
    note = {
        "pid": 1,
        "start": "1",
        "host": "elsewhere",
        "job": "17",
        "attempt": "0",
        "cluster": "a",
    }
    (folder / ".lock").write_text(json.dumps(note))


def put_command(file: Path, answer: str, path: pytest.MonkeyPatch | None = None) -> None:
    """A command of Slurm that answers so; with ``path`` it is found, and nothing was asked before."""
    file.write_text(f"#!/bin/sh\n{answer}\n")
    file.chmod(0o755)
    if path is not None:
        path.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
        path.setattr(lock, "_running", {})
        lock._configured_cluster.cache_clear()


def test_a_job_that_was_requeued_takes_over_from_its_own_past(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt before was killed with its node; another job's lock on another node stays."""
    hold_by_a_job_elsewhere(folder)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(UserError, match="on elsewhere"), lock.hold(folder):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "b")  # whose job 17 is another
    with pytest.raises(UserError, match="on elsewhere"), lock.hold(folder):
        pass
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    with lock.hold(folder) as told:
        assert "took over from process 1" in told[0]


@pytest.mark.parametrize(
    ("answer", "alive"),
    [
        ("echo '17 main sasrec R'", True),
        ("exit 0", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ],
)
def test_a_job_on_another_node_holds_as_long_as_slurm_says_that_it_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, alive: bool
) -> None:
    hold_by_a_job_elsewhere(folder)
    put_command(tmp_path / "scontrol", "echo 'ClusterName             = a'", monkeypatch)
    put_command(tmp_path / "squeue", answer, monkeypatch)
    assert (lock.holder(folder) is not None) == alive
    put_command(tmp_path / "squeue", "exit 0")
    assert (lock.holder(folder) is not None) == alive, "Slurm is not asked again at once"
    monkeypatch.setattr(lock, "ASK_SECONDS", 0.0)
    assert lock.holder(folder) is None


def test_slurm_is_not_asked_about_the_jobs_of_another_cluster(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our squeue knows no job 17; that of the cluster whose job it is may run it."""
    hold_by_a_job_elsewhere(folder)
    put_command(tmp_path / "squeue", "exit 0", monkeypatch)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "b")
    assert lock.holder(folder) is not None
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    assert lock.holder(folder) is None


@pytest.mark.parametrize("other", [{"boot": "another"}, {"pids": "pid:[1]"}])
def test_a_process_id_of_a_namesake_is_not_looked_up_here(
    folder: Path, other: dict[str, str]
) -> None:
    """The host's name is ours, but it is another machine or container: its process may live."""
    write(folder, **other, start="1")
    said = lock.holder(folder)
    assert said is not None
    assert str(folder / lock.NAME) in said
    with pytest.raises(UserError, match="delete"), lock.hold(folder):
        pass


def test_nothing_survives_a_restart_of_its_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process id and its time are those of a living process of today."""
    monkeypatch.setattr(lock, "_place", lambda: {**PLACE, "machine": "m"})
    write(folder, boot="yesterday", machine="m")
    assert lock.holder(folder) is None
    write(folder, boot="yesterday", machine="another")
    assert lock.holder(folder) is not None


def test_a_lock_that_another_has_taken_meanwhile_is_left_alone(folder: Path) -> None:
    """Another host may have a process of our number, too: whose lock it is, the lock says."""
    with lock.hold(folder):
        note = json.loads((folder / lock.NAME).read_text())
        (folder / lock.NAME).write_text(json.dumps({**note, "id": "of another"}))
    assert json.loads((folder / lock.NAME).read_text())["id"] == "of another"


def test_one_that_may_wait_gets_the_lock_when_it_is_free(
    folder: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
    killed: list[float] = []

    def pause(seconds: float) -> None:
        killed.append(seconds)
        other.kill()
        other.wait()

    monkeypatch.setattr(lock.time, "sleep", pause)
    with lock.hold(folder, wait=True) as told:
        assert killed
        assert f"took over from process {other.pid}" in told[0]
