"""Errors of the machine as sentences: each found in what really raises it, and nothing else taken for it."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import faults

JOB: dict[str, Any] = {
    "stage": "train",
    "spec": {"run": "fit", "batch_size": 64},
    "launch": {"devices": 2, "num_nodes": 2, "micro_batch_size": None},
}


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"),
     (errno.EFBIG, "larger than its limit"), (errno.EROFS, "may not be written"),
     (errno.EACCES, "may not be written")],
)  # fmt: skip
def test_what_cannot_be_written(number: int, told: str) -> None:
    said = faults.explained(OSError(number, "reason", "runs/x/last.ckpt"))
    assert said is not None
    assert told in said
    assert "runs/x/last.ckpt" in said


def test_the_reason_is_found_behind_other_errors() -> None:
    """torch says that a position is unexpected; Polars and safetensors raise errors of their own."""
    error = RuntimeError("unexpected pos 704 vs 598")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")  # as torch leaves it
    assert "the disk is full" in (faults.explained(error, Path("runs/x")) or "")
    other = ValueError("parquet: underlying IO error: No space left on device (os error 28)")
    assert "the disk is full" in (faults.explained(other) or "")
    assert faults.explained(ValueError("an error (os error 2)")) is None
    assert faults.explained(FileNotFoundError(errno.ENOENT, "no", "x")) is None
    assert faults.explained(RuntimeError("shapes differ")) is None


def test_no_memory_of_a_gpu_and_of_the_host() -> None:
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    with pytest.raises(RuntimeError) as host:
        torch.empty(2**50)
    for error in (gpu, host.value, MemoryError()):
        told = faults.explained(error, None, JOB)
        assert told is not None
        # 64 rows over four devices
        assert "lower launch.micro_batch_size=8 (now 16" in told
        assert "launch.activation_checkpointing=true" in told
        assert "stages.train.batch_size" in told
    cut = {**JOB["launch"], "micro_batch_size": 2, "activation_checkpointing": True}
    words = " ".join(faults.lower({**JOB, "launch": cut}))
    assert "micro_batch_size=1 (now 2" in words
    assert "activation_checkpointing" not in words
    tested = {**JOB, "stage": "evaluate", "spec": {"run": "test", "batch_size": 64}}
    assert faults.lower(tested) == [
        "lower stages.evaluate.batch_size=32 (now 64; no result changes)"
    ]


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        "torch==2.13.0", 'pytest>=9; extra == "dev"', 'Some_Package>=5; extra == "dev"',
        'some-package>=5; extra == "sweep"',
    ]  # fmt: skip
    monkeypatch.setattr(faults, "requires", lambda name: listed)

    def told(name: str) -> str | None:
        return faults.explained(ModuleNotFoundError(f"No module named {name!r}", name=name))

    assert (told("some_package.inner") or "").endswith('pip install ".[sweep]"')
    assert (told("pytest") or "").endswith('pip install ".[dev]"')
    assert (told("other_package") or "").endswith("pip install other-package")
    assert told("experiments.nothing") is None, "a module of ours is a fault of the code"


def test_our_own_extras_are_read_from_the_installed_metadata() -> None:
    assert faults.extra_of("hypothesis") == "dev"
    assert faults.extra_of("no_such_package") is None


def test_a_rank_that_hears_of_another_says_so_and_a_single_process_does_not() -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    assert "another rank has ended" in (faults.explained(error, None, JOB) or "")
    alone = {**JOB, "launch": {"devices": 1, "num_nodes": 1, "micro_batch_size": None}}
    assert faults.explained(error, None, alone) is None


def test_what_killed_a_process() -> None:
    assert "ran out of memory" in faults.killed(signal.SIGKILL, None)
    assert "one of its ranks, was killed by SIGSEGV" in faults.killed(11, JOB["launch"])
    assert "memory" not in faults.killed(signal.SIGTERM, None)
    assert "signal 99" in faults.killed(99, None)
