"""What a machine's own failures come to in a sentence: a full disk, no memory, no package. No torch here."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from datamodules.versioning import read_json
from experiments.messages import short
from experiments.source_graph import PACKAGES

PROJECT = "llmrec-lightning"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NUMBERED = re.compile(r"\(os error (\d+)\)")  # how Polars and safetensors tell of an OSError
_ALONE = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|\bgloo\b|NCCL|process group|DistNetworkError"
)
_NO_MEMORY = re.compile(r"CUDA out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")


def explained(
    error: BaseException, folder: Path | None = None, job: dict[str, Any] | None = None
) -> str | None:
    """A sentence about an error that is the machine's; None of any other.

    Args:
        error: with what it was raised from.
        folder: of the run, if it is a stage's.
        job: what ``stage.json`` says.
    """
    for each in _chain(error):
        if number := _number(each):
            return _disk(number, each, folder)
        if isinstance(each, ModuleNotFoundError) and (told := missing_package(each)):
            return told
        if _is_memory(each):
            return _memory(each, job)
    # Last: what a rank says of itself is the reason, what it hears of another is not.
    if job and _devices(job["launch"]) > 1 and _ALONE.search(f"{type(error).__name__} {error}"):
        first = str(error).strip().partition("\n")[0][:120]
        return (
            f"another rank has ended ({first}): it was killed, ran out of memory, or says above what was "
            "wrong; the same command resumes"
        )
    return None


def _devices(launch: dict[str, Any]) -> int:
    return int(launch["devices"]) * int(launch["num_nodes"])


def killed(number: int, launch: dict[str, Any] | None) -> str:
    """What a process that did not end by itself means."""
    many = launch is not None and _devices(launch) > 1
    who = "the process, or one of its ranks," if many else "the process"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    memory = (
        "; where nobody did that the machine ran out of memory: lower launch.micro_batch_size, "
        "launch.num_workers or batch_size"
    )
    hint = memory if number == signal.SIGKILL else ""
    return f"{who} was killed by {name}; the same command resumes{hint}"


def left_by(folder: Path | None) -> str:
    """How a stage that was stopped goes on, as the end of a sentence; nothing of what has no run folder."""
    if folder is None:
        return ""
    if (folder / "last.ckpt").is_file():
        return "; the same command goes on from the last checkpoint"
    stage = read_json(folder / "stage.json") or {}
    if (stage.get("spec") or {}).get("run") == "fit":
        return (
            "; no epoch had ended, so that the same command begins this stage again (a single Ctrl-C, or "
            "kill -USR1, saves inside an epoch)"
        )
    return "; the same command goes on where it stood"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Which package is not installed, and which of our extras brings it; None of a module of ours."""
    name = (error.name or "").partition(".")[0]
    if not name or name in PACKAGES:
        return None
    extra = extra_of(name)
    wanted = f'".[{extra}]"' if extra else name.replace("_", "-")
    return f"the package {name} is not installed: .venv/bin/python -m pip install {wanted}"


def extra_of(name: str) -> str | None:
    """The extra of this project that brings a package; ``dev`` only where no other does."""
    try:
        listed = requires(PROJECT) or []
    except PackageNotFoundError:
        return None
    found = (re.match(r"([\w.-]+).*\bextra\s*==\s*[\"']([\w-]+)[\"']", line) for line in listed)
    extras = [m[2] for m in found if m and _same(m[1], name)]
    return min(extras, key=lambda e: e == "dev") if extras else None


def _same(one: str, other: str) -> bool:
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from; the last is what happened first."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__


def _number(error: BaseException) -> int | None:
    """The system's number of an error of writing."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBERED.search(str(error))):
        number = int(found[1])
    return number if number in (*FULL, *CLOSED) else None


def _disk(number: int, error: BaseException, folder: Path | None) -> str:
    named = getattr(error, "filename", None)
    place = named or (short(folder) if folder else "a file")
    reason = {errno.EFBIG: "a file is larger than its limit allows (ulimit -f)"}.get(
        number, "the disk is full"
    )
    if number in CLOSED:
        reason = "it may not be written (read-only, or no rights)"
        remedy = "give rights to it, or set LLMREC_RUNS (or LLMREC_CACHE) to another folder"
    else:
        remedy = "make room"
    return f"{place}: {reason}; nothing that was finished is lost: {remedy}, and run the same command again"


def _is_memory(error: BaseException) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def _memory(error: BaseException, job: dict[str, Any] | None) -> str:
    first = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
    return f"out of memory ({first[:160]}): {'; '.join(lower(job)) or 'give it more'}"


def lower(job: dict[str, Any] | None) -> list[str]:
    """Settings of a stage that take less memory, those that change no result first."""
    if job is None:
        return []
    spec, launch, stage = job["spec"], job["launch"], job["stage"]
    share = int(spec["batch_size"]) // _devices(launch)
    if spec["run"] != "fit":
        now = int(spec["batch_size"])
        half = f"lower stages.{stage}.batch_size={max(1, now // 2)} (now {now}; no result changes)"
        return [half] if now > 1 else ["take a smaller llm, or one in 4 bits (llm=..._nf4)"]
    words = []
    micro = min(share, launch["micro_batch_size"] or share)
    if micro > 1:
        words.append(
            f"lower launch.micro_batch_size={micro // 2} (now {micro}; the same steps, in smaller parts)"
        )
    if not launch.get("activation_checkpointing"):
        words.append("a language model also takes launch.activation_checkpointing=true")
    words.append(f"or another result: a smaller stages.{stage}.batch_size, module or llm (..._nf4)")
    return words
