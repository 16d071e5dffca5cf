"""One driver per run folder: a lock file that names its holder and dies with it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    while not _create(path):
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
        if (_read(path) or {}).get("pid") == os.getpid():
            path.unlink(missing_ok=True)


def add_child(folder: Path, pid: int) -> None:
    """Note the stage's own process, which may outlive a killed driver for a moment."""
    path = folder / NAME
    note = {**(_read(path) or {}), "child": pid, "child_start": _start_time(pid)}
    part = path.with_name(f"{NAME}.{os.getpid()}.part")
    part.write_text(json.dumps(note))
    os.replace(part, path)


def holder(folder: Path) -> str | None:
    """'being run by ...' while a living process (or one on another host) holds the folder."""
    note = _read(folder / NAME)
    if note is None or not _alive(note):
        return None
    if note.get("host") != socket.gethostname():
        where = f"process {note.get('pid')} on {note.get('host')}"
        return f"being run by {where} (if that is gone, delete {folder / NAME})"
    return f"being run by process {note.get('pid')}"


def _alive(note: dict[str, object]) -> bool:
    """Whether the driver or its stage process still runs; on another host only a Slurm job's end can be told.

    An earlier attempt of our own job runs no more where it ran.
    """
    job, attempt = _attempt()
    if job and note.get("job") == job and note.get("attempt") != attempt:
        return False
    if note.get("host") != socket.gethostname():
        return not _job_ended(note.get("job"))
    pairs = ((note.get("pid"), note.get("start")), (note.get("child"), note.get("child_start")))
    return any(pid and start is not None and _start_time(pid) == start for pid, start in pairs)


def _job_ended(job: object) -> bool:
    """Whether Slurm says that a job runs no more; where it says nothing, it may run."""
    if not job or time.monotonic() - _running.get(job, -math.inf) < ASK_SECONDS:
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


def _attempt() -> tuple[str | None, str]:
    """Our Slurm job, and how often it was requeued."""
    return os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")


def _create(path: Path) -> bool:
    note = {"pid": os.getpid(), "start": _start_time(os.getpid()), "host": socket.gethostname()}
    job, attempt = _attempt()
    note |= {"job": job, "attempt": attempt} if job else {}
    part = path.with_name(f"{NAME}.{os.getpid()}.new")
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
    aside = path.with_name(f"{NAME}.{os.getpid()}.dead")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return ""
    note = _read(aside)
    if note is not None and _alive(
        note
    ):  # another driver was quicker, and this is its lock: give it back
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
