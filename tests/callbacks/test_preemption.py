"""When a run that was asked to stop does, and what a checkpoint of inside an epoch counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from callbacks import stop_request
from callbacks.checkpoints import AtomicCheckpointIO, checkpoints
from callbacks.preemption import Preemption
from callbacks.stop_request import Stopped
from datamodules.samplers import GlobalBatchSampler, RowBatch


@pytest.fixture(autouse=True)
def unasked() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    stop_request.forget()
    yield
    stop_request.forget()
    signal.signal(signal.SIGUSR1, before)


def trainer(accumulates: bool = False, last: bool = False, validates: bool = False) -> Any:
    epoch = SimpleNamespace(
        _is_training_done=last,
        _should_accumulate=lambda: accumulates,
        _should_check_val_fx=lambda fetcher: validates,
    )
    saved: list[Path] = []
    return SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=epoch, _data_fetcher=None),
        world_size=1,
        saved=saved,
        save_checkpoint=saved.append,
    )


def end_batch(stopper: Preemption, made: Any) -> None:
    stopper.on_train_batch_end(made, None, None, None, 0)


def test_signals_are_counted_and_nothing_else() -> None:
    stop_request.listen(signal.SIGUSR1)
    assert not stop_request.asked()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop_request.asked()


def test_a_fit_stops_behind_a_whole_step_only(tmp_path: Path) -> None:
    stopper = Preemption(tmp_path)
    end_batch(stopper, trainer())  # nobody asked
    stop_request.note()
    for goes_on in (trainer(accumulates=True), trainer(last=True), trainer(validates=True)):
        end_batch(stopper, goes_on)
        assert goes_on.saved == []
    stops = trainer()
    with pytest.raises(Stopped):
        end_batch(stopper, stops)
    assert stops.saved == [tmp_path / "last.ckpt"]
    with pytest.raises(Stopped):
        stopper.on_train_epoch_start(trainer(), None)  # type: ignore[arg-type]


def test_all_ranks_stop_where_one_was_asked(tmp_path: Path) -> None:
    asked: list[bool] = []

    def reduce(decision: bool, all: bool) -> bool:
        asked.append(decision)
        return True  # another rank was

    made = trainer()
    made.world_size, made.strategy = 2, SimpleNamespace(reduce_boolean_decision=reduce)
    with pytest.raises(Stopped):
        end_batch(Preemption(tmp_path), made)
    assert asked == [False]
    assert made.saved == [tmp_path / "last.ckpt"]


def test_a_test_and_a_prediction_stop_behind_a_batch_without_the_other_ranks(
    tmp_path: Path,
) -> None:
    stopper = Preemption(tmp_path)
    stopper.on_test_batch_end()
    stopper.on_predict_batch_end()
    stop_request.note()
    with pytest.raises(Stopped):
        stopper.on_test_batch_end()
    with pytest.raises(Stopped):
        stopper.on_predict_batch_end()


def test_batches_are_counted_in_the_micro_batches_of_this_launch(tmp_path: Path) -> None:
    """Three steps of an epoch, of four micro batches then and of two now."""
    stopper = Preemption(tmp_path)
    counts = {"ready": 12, "started": 12, "processed": 12, "completed": 11}
    progress = {"current": dict(counts), "total": {k: v + 40 for k, v in counts.items()}}
    checkpoint: dict[str, Any] = {
        "callbacks": {stopper.state_key: {"micro_batches": 4}},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
    }
    now: Any = SimpleNamespace(accumulate_grad_batches=2)
    stopper.on_load_checkpoint(now, None, checkpoint)  # type: ignore[arg-type]
    expected = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    assert progress["current"] == expected
    assert progress["total"] == {k: v + 40 for k, v in expected.items()}


class Rows(Dataset[Any]):
    def __getitem__(self, rows: RowBatch) -> tuple[int, torch.Tensor]:
        return rows.epoch, torch.tensor(rows.row)


class Learner(pl.LightningModule):
    """Learns from row numbers, and notes them: epoch, the sampler's epoch, rows."""

    def __init__(self, ask_at: int | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.ask_at, self.seen = ask_at, list[Any]()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.ask_at:
            stop_request.note()
        epoch, rows = batch
        self.seen.append((self.current_epoch, epoch, rows.tolist()))
        return ((self.weight * rows / 22 - 1) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def learn(folder: Path, ask_at: int | None, **limits: int) -> tuple[Learner, bool]:
    """A fit of six steps an epoch, two micro batches each; whether it was stopped."""
    stop_request.forget()
    sampler = GlobalBatchSampler(np.ones(22), batch_size=4, micro_batches=2)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accumulate_grad_batches=2,
        callbacks=[*checkpoints(folder, None, "max"), Preemption(folder)],
        plugins=[AtomicCheckpointIO()], **limits,
    )  # fmt: skip
    loader = DataLoader(Rows(), sampler=sampler, batch_size=None, collate_fn=lambda rows: rows)
    module, last = Learner(ask_at), folder / "last.ckpt"
    try:
        trainer.fit(module, loader, ckpt_path=last if last.is_file() else None, weights_only=True)
    except Stopped:
        return module, True
    return module, False


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 14}])
@pytest.mark.parametrize("ask_at", [3, 11, 27])
def test_it_goes_on_with_what_was_not_learned_from(
    tmp_path: Path, limits: dict[str, int], ask_at: int
) -> None:
    """Inside an epoch, at its end, and in the very last step, behind which nothing is left to do."""
    whole, _ = learn(tmp_path / "whole", None, **limits)
    first, stopped = learn(tmp_path / "parts", ask_at, **limits)
    then, _ = learn(tmp_path / "parts", None, **limits) if stopped else (first, False)
    assert stopped == (ask_at < 20)
    assert [*first.seen, *(then.seen if stopped else [])] == whole.seen
    assert torch.equal(then.weight, whole.weight)
    assert (tmp_path / "parts" / "best.ckpt").is_file()


def test_the_first_interrupt_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_request.listen_to_interrupts()
        signal.raise_signal(signal.SIGINT)
        assert stop_request.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a shell's background job
        stop_request.listen_to_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
