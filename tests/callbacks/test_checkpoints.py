"""A checkpoint is whole or the old one, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.checkpoints import AtomicCheckpointIO, Patience, checkpoints


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"epoch": 1, "weight": torch.ones(3)}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]

    def half(value: Any, file: Any) -> None:
        file.write(b"half of a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        io.save_checkpoint({"epoch": 2}, path)
    assert io.load_checkpoint(path)["epoch"] == 1


def test_loading_never_unpickles_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"object": SimpleNamespace(a=1)}, path)
    with pytest.raises(Exception, match=r"weights_only|Weights only|Unsupported"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


def test_patience_that_has_run_out_stops_a_resumed_fit() -> None:
    stopper = Patience("val/all/ndcg@10", patience=2, mode="max")
    trainer: Any = SimpleNamespace(should_stop=False)
    stopper.wait_count = 1
    stopper.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert not trainer.should_stop
    stopper.wait_count = 2
    stopper.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert trainer.should_stop


def test_last_is_written_after_best_and_every_epoch(tmp_path: Path) -> None:
    best, last = checkpoints(tmp_path, "val/all/ndcg@10", "max")
    assert (best.monitor, best.filename) == ("val/all/ndcg@10", "best")
    assert (last.monitor, last.filename) == (None, "last")
    assert best.state_key != last.state_key  # or one would load the other's state
