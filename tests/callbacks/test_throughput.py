"""Rows, tokens and padding, counted by hand; validation does not run the clock."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks import throughput
from callbacks.throughput import Throughput
from experiments import artifacts, build, config

FILMS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "movielens" / "ml-100k"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now.seconds)
    return now


def _batch(mask: list[list[int]] | None, rows: int = 2) -> Any:
    return SimpleNamespace(
        row=torch.arange(rows), user=torch.arange(rows) // 2,
        token_mask=None if mask is None else torch.tensor(mask),
    )  # fmt: skip


def test_what_a_fit_reads_is_counted_without_its_validation(clock: Any) -> None:
    counted, trainer, module = Throughput(), SimpleNamespace(world_size=2, global_step=7), None
    counted.on_train_epoch_start(trainer, module)
    trainer.global_step = 9  # resumed behind the seventh step
    counted.on_train_batch_end(trainer, module, None, _batch([[0, 1, 1], [1, 1, 1]]), 0)
    clock.seconds = 4.0
    counted.on_validation_start(trainer, module)
    clock.seconds = 100.0
    counted.on_validation_end(trainer, module)
    clock.seconds = 101.0
    counted.on_train_epoch_end(trainer, module)
    expected = {
        "rows_per_second": 4 / 5,
        "seconds_per_step": 5 / 2,
        "tokens_per_second": 10 / 5,
        "padding": 1 / 6,
    }
    assert counted.summary() == pytest.approx(expected, abs=1e-4)
    assert counted.told() == "2.5 s a step, 0.8 rows/s, 2 tokens/s; padding was 16.7% of all tokens"


def test_ids_have_no_tokens_and_nothing_has_no_speed(clock: Any) -> None:
    counted, trainer = Throughput(), SimpleNamespace(world_size=1)
    assert counted.summary() == {}
    counted.on_test_start(trainer, None)
    counted.on_test_batch_end(trainer, None, None, _batch(None, rows=3), 0)
    clock.seconds = 2.0
    counted.on_test_end(trainer, None)
    assert counted.summary() == {"rows_per_second": 1.5, "users_per_second": 1.0}
    assert counted.told() is None


def test_a_test_of_prompts_tells_its_users(clock: Any) -> None:
    counted, trainer = Throughput(), SimpleNamespace(world_size=1)
    counted.on_test_start(trainer, None)
    for _ in range(2):  # the same user's rows in two batches: one user
        counted.on_test_batch_end(trainer, None, None, _batch([[0, 1], [1, 1]]), 0)
    clock.seconds = 4.0
    counted.on_test_end(trainer, None)
    assert counted.told() == "0.25 users/s, 1 rows/s, 2 tokens/s; padding was 25.0% of all tokens"


def test_packed_rows_are_counted_one_by_one(clock: Any) -> None:
    counted, trainer = Throughput(), SimpleNamespace(world_size=2, global_step=0)
    batch = _batch([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch.positions = torch.tensor(
        [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    )  # rows of 3, 2 and 3; padding
    counted.on_train_epoch_start(trainer, None)
    counted.on_train_batch_end(trainer, None, None, batch, 0)
    clock.seconds = 2.0
    counted.on_train_epoch_end(trainer, None)
    expected = {
        "rows_per_second": 3,
        "tokens_per_second": 8,
        "padding": 0.2,
        "padding_without_packing": 1 / 9,
    }
    assert counted.summary() == pytest.approx(expected, abs=1e-4)
    assert str(counted.told()).endswith("padding was 20.0% of all tokens, without packing 11.1%")


def test_what_all_rows_begin_with_counts_once_a_training_batch(clock: Any) -> None:
    counted, trainer = Throughput(), SimpleNamespace(world_size=2, global_step=0)
    module = SimpleNamespace(shared_tokens=2)
    counted.on_train_epoch_start(trainer, module)
    for _ in range(3):  # 2 shared tokens, and 2 and 1 behind them beside one of padding
        trainer.global_step += 1
        counted.on_train_batch_end(trainer, module, None, _batch([[1, 1, 1, 1], [0, 1, 1, 1]]), 0)
    clock.seconds = 10.0
    counted.on_train_epoch_end(trainer, module)
    assert counted.counts() == (12, 2 * 3 * (2 + 3), 2 * 3, 0)
    assert counted.summary()["shared_tokens"] == 2
    assert counted.told() == (
        "3.33 s a step, 1.2 rows/s, 3 tokens/s; padding was 16.7% of all tokens; the 2 that all rows "
        "begin with were read once a batch"
    )


def test_what_all_rows_begin_with_counts_once_a_test(clock: Any) -> None:
    counted, trainer = Throughput(), SimpleNamespace(world_size=1)
    module = SimpleNamespace(shared_tokens=2)
    counted.on_test_start(trainer, module)
    for _ in range(3):
        counted.on_test_batch_end(trainer, module, None, _batch([[1, 1, 1, 1], [0, 1, 1, 1]]), 0)
    clock.seconds = 1.0
    counted.on_test_end(trainer, module)
    assert counted.counts() == (6, 2 + 3 * 3, 3, 0)
    assert str(counted.told()).endswith("; the 2 that all rows begin with were read once")


@pytest.mark.skipif(not FILMS.is_dir(), reason="no shared/data beside the repository")
@pytest.mark.parametrize("training", [True, False])
def test_few_of_the_tokens_that_are_computed_of_real_films_are_padding(
    training: bool, clock: Any
) -> None:
    """TALLRec's default batches; its openings, which are no padding, are not counted for each row."""
    options = [f"data.root={FILMS}", "llm=tiny_random"]
    experiment = config.load("tallrec/movie_64shot", options)
    spec = artifacts.stage_spec(experiment, "train" if training else "evaluate")
    (node,) = spec["modules"].values()
    data: Any = build.build(spec["data"])
    data.batch_size = spec["batch_size"]
    module: Any = build.build_on(node, data)
    trainer = SimpleNamespace(
        lightning_module=module, datamodule=data, world_size=1, global_rank=0, global_step=0,
        accumulate_grad_batches=1,
    )  # fmt: skip
    module.trainer = data.trainer = trainer
    loader = data.train_dataloader() if training else data.test_dataloader()
    reads = SimpleNamespace(shared_tokens=len(module.table.common_prefix()))
    counted = Throughput()
    for number, batch in enumerate(loader):
        if training:
            counted.on_train_batch_end(trainer, reads, None, batch, number)
        else:
            counted.on_test_batch_end(trainer, reads, None, batch, number)
    rows, tokens, padding, _ = counted.counts()
    assert rows == (len(data.prepared.examples()) if training else 1000)
    assert tokens > 100 * rows
    assert reads.shared_tokens > 50
    assert 0 < padding / (tokens + padding) < 0.1
