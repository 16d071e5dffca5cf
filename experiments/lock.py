"""One driver per run folder: a lock file that names its holder and dies with it.

A holder is a process id, which means something on one machine, since its last start, in one process
namespace alone; with the time when it began, so that a number that was given again is another process. Of
any other place only the Slurm of the job's own cluster can say that it has ended: others give its number too.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from callbacks import stop_request
from experiments.errors import UserError
from experiments.messages import say

NAME = ".lock"
WAIT_SECONDS = 2.0
ASK_SECONDS = 60.0  # between two questions to Slurm about a job: many may wait for hours
_running: dict[object, float] = {}  # job -> when Slurm last said that it runs


@contextmanager
def hold(folder: Path, wait: bool = False) -> Iterator[list[str]]:
    """Hold ``folder/.lock`` while a stage runs; yields messages about a lock that was taken over.

    Args:
        folder: of the run.
        wait: until a living process lets it go.

    Raises:
        UserError: a living process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    messages: list[str] = []
    waited = False
    mine = uuid.uuid4().hex  # of a process that is on no other machine and was at no other time
    while not _create(path, mine):
        if (alive := holder(folder)) and wait:
            if not waited:
                say(f"  {folder.name} is {alive}; waiting for it")
            waited = True
            time.sleep(WAIT_SECONDS)
            if stop_request.asked():
                raise stop_request.Stopped
            continue
        if alive:
            raise UserError(f"{folder.name} is {alive}; wait for it, or stop it and run again")
        messages.append(_take_over(path))
    try:
        yield [m for m in messages if m]
    finally:
        if (_read(path) or {}).get("id") == mine:
            path.unlink(missing_ok=True)


def add_child(folder: Path, pid: int) -> None:
    """Note the stage's own process, which may outlive a killed driver for a moment."""
    path = folder / NAME
    note = {**(_read(path) or {}), "child": pid, "child_start": _start_time(pid)}
    part = path.with_name(f"{NAME}.{uuid.uuid4().hex}.part")
    part.write_text(json.dumps(note))
    os.replace(part, path)


def holder(folder: Path) -> str | None:
    """'being run by ...' while a living process (or one that cannot be asked) holds the folder."""
    note = _read(folder / NAME)
    if note is None or not _alive(note):
        return None
    if _is_here(note):
        return f"being run by process {note.get('pid')}"
    where = f"process {note.get('pid')} on {note.get('host')}"
    return f"being run by {where} (if that is gone, delete {folder / NAME})"


def _alive(note: dict[str, object]) -> bool:
    """Whether the driver or its stage process still runs; elsewhere only a Slurm job's end can be told.

    An earlier attempt of our own job runs no more where it ran, and nothing survives its machine's restart.
    """
    job, attempt, cluster = _attempt()
    ours = job and note.get("job") == job and note.get("cluster") == cluster
    if (ours and note.get("attempt") != attempt) or _restarted(note):
        return False
    if not _is_here(note):
        return not _job_ended(note.get("job"), note.get("cluster"))
    pairs = ((note.get("pid"), note.get("start")), (note.get("child"), note.get("child_start")))
    return any(pid and start is not None and _start_time(pid) == start for pid, start in pairs)


@cache
def _place() -> dict[str, str]:
    """Where a process id of ours means something; what the system does not tell is left out."""
    found = {"host": socket.gethostname()}
    for name, file in (("boot", "/proc/sys/kernel/random/boot_id"), ("machine", "/etc/machine-id")):
        with suppress(OSError):
            found[name] = Path(file).read_text().strip()
    with suppress(OSError):
        found["pids"] = os.readlink("/proc/self/ns/pid")
    return {name: text for name, text in found.items() if text}


def _is_here(note: dict[str, object]) -> bool:
    """Whether we see the processes that a note is about: one machine, one start of it, one namespace."""
    return all(note.get(n) == _place().get(n) for n in ("host", "boot", "pids"))


def _restarted(note: dict[str, object]) -> bool:
    """Whether this very machine was started again since. Others may have its host name, and no machine id."""
    mine, theirs = _place(), note
    alike = all(mine.get(n) and mine[n] == theirs.get(n) for n in ("host", "machine"))
    known = bool(mine.get("boot") and theirs.get("boot"))
    return alike and known and mine["boot"] != theirs["boot"]


def _job_ended(job: object, cluster: object) -> bool:
    """Whether Slurm says that a job runs no more; where it says nothing, it may run.

    Args:
        job: its number.
        cluster: whose; another cluster that shares the file system may have had the number for another job.
    """
    if not job or time.monotonic() - _running.get(job, -math.inf) < ASK_SECONDS:
        return False
    if not cluster or cluster != _cluster():
        return False
    words = ["squeue", "--noheader", f"--jobs={job}", "--states=RUNNING,COMPLETING,SUSPENDED"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    ended = "Invalid job id" in done.stderr or (done.returncode == 0 and not done.stdout.strip())
    if not ended:
        _running[job] = time.monotonic()
    return ended


def _cluster() -> str | None:
    """Of this job; outside of jobs that which commands are sent to, where there is one."""
    return os.environ.get("SLURM_CLUSTER_NAME") or _configured_cluster()


@cache
def _configured_cluster() -> str | None:
    words = ["scontrol", "show", "config"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    named = (line.partition("=") for line in done.stdout.splitlines())
    return next((value.strip() for name, _, value in named if name.strip() == "ClusterName"), None)


def _attempt() -> tuple[str | None, str, str | None]:
    """Our Slurm job, how often it was requeued, and whose it is."""
    told = os.environ.get
    return told("SLURM_JOB_ID"), told("SLURM_RESTART_COUNT", "0"), told("SLURM_CLUSTER_NAME")


def _create(path: Path, mine: str) -> bool:
    note = {"id": mine, "pid": os.getpid(), "start": _start_time(os.getpid()), **_place()}
    job, attempt, cluster = _attempt()
    note |= {"job": job, "attempt": attempt, "cluster": cluster} if job else {}
    part = path.with_name(f"{NAME}.{mine}.new")
    part.write_text(json.dumps({**note, "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
    try:
        os.link(part, path)  # atomic, and the file is whole from its first moment
    except FileExistsError:
        return False
    finally:
        part.unlink()
    return True


def _take_over(path: Path) -> str:
    """Move a dead holder's lock aside; of several that try, one succeeds."""
    with _guarded(path.parent):
        note = _read(path)
        if note is not None and _alive(note):
            return ""  # another driver was quicker
        return _move_aside(path)


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Alone on this machine, where the file system can lock a folder."""
    import fcntl  # not on every system

    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _move_aside(path: Path) -> str:
    aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}.dead")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return ""
    note = _read(aside)
    if note is not None and _alive(note):
        # Another driver was quicker, and this is its lock: give it back.
        with suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
        return ""
    aside.unlink()
    if note is None:
        return "took over a lock file that nobody can read"
    return (
        f"took over from process {note.get('pid')}, which died holding it since {note.get('since')}"
    )


def _read(path: Path) -> dict[str, object] | None:
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _start_time(pid: object) -> str | None:
    """When a process began, so that a reused pid is not mistaken for it; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _start_without_proc(pid)
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _start_without_proc(pid: object) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(int(str(pid)), 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
