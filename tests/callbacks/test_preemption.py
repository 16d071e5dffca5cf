"""When a run that was asked to stop does, and what a checkpoint of inside an epoch counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import stop_request
from callbacks.preemption import Preemption
from callbacks.stop_request import Stopped


@pytest.fixture(autouse=True)
def unasked() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    stop_request.forget()
    yield
    stop_request.forget()
    signal.signal(signal.SIGUSR1, before)


def trainer(accumulates: bool = False, last: bool = False, validates: bool = False) -> Any:
    epoch = SimpleNamespace(
        batch_progress=SimpleNamespace(is_last_batch=last),
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
