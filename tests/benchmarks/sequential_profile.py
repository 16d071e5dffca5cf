"""What limits our training step: its share of the machine's measured peak, and where the time goes.

The same batches are run three times: as they are (seconds), under torch's FLOP counter, and under its
profiler, whose own cost makes shares of small operations somewhat too large.

Legend: B rows, T history length, N positions with a loss, I items, d width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.sequential_measure import copy_speed, matmul_speed, say

LOSS = "benchmark: loss"
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Reads and writes of the scores by what is no matrix product: max, minus, exp (in place), sum.
PASSES = 1 + 2 + 2 + 1


class Meter(pl.Callback):
    """Seconds of one epoch, loading included, and the sizes of its batches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.positions = 0  # sum of N
        self.squares = 0  # sum of B T^2
        self.steps = 0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self.positions += int((batch.targets > 0).sum())
        rows, width = batch.history.shape
        self.squares += rows * width**2
        self.steps += 1

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def run(module: Any, data: Any, steps: int, around: AbstractContextManager[Any]) -> Meter:
    """The first ``steps`` batches of an epoch, the same at every call."""
    meter = Meter()
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=steps, accelerator="cpu", devices=1, logger=False,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, callbacks=[meter],
    )  # fmt: skip
    with around:
        trainer.fit(module, datamodule=data)
    return meter


def below(event: Any) -> Iterator[Any]:
    """An event and all that ran inside it."""
    yield event
    for child in event.cpu_children:
        yield from below(child)


def seconds_of(events: list[Any]) -> float:
    return float(sum(event.cpu_time_total for event in events)) / 1e6


def with_backward(ranges: list[Any], backward: list[Any]) -> float:
    """Seconds of forward ranges and of the gradients of what ran inside them."""
    numbers = {each.sequence_nr for one in ranges for each in below(one)} - {-1}
    return seconds_of(ranges) + seconds_of([b for b in backward if b.sequence_nr in numbers])


def parts(events: list[Any], total: float) -> dict[str, float]:
    """Seconds by part of the step; what no range names is the rest."""
    named: Callable[[str], list[Any]] = lambda start: [  # noqa: E731
        event for event in events if event.name.startswith(start)
    ]
    backward = named("autograd::engine::evaluate_function")
    loss = named(LOSS)
    products = [e for one in loss for e in below(one) if e.name in ("aten::mm", "aten::addmm_")]
    found = {
        "loss: matrix products": seconds_of(products),
        "loss: max, exp, sums": with_backward(loss, backward) - seconds_of(products),
        "attention without its linear layers": with_backward(
            [e for e in events if e.name == "aten::scaled_dot_product_attention"], backward
        ),
        # Not the range of Optimizer.step: Lightning runs the whole step inside it.
        "optimizer": seconds_of(named("aten::_fused_adamw_")),
        "data loading": seconds_of(named("enumerate(DataLoader)")),
    }
    rest = "rest: linear layers, norms, dropout, embeddings, Lightning"
    return {**found, rest: max(0.0, total - sum(found.values()))}


def profile(module: Any, data: Any, steps: int) -> dict[str, Any]:
    """Speeds, shares of the peaks and shares of the time, over ``steps`` training steps."""
    say(f"ours: profile of {steps} steps")
    peak, bandwidth = matmul_speed(), copy_speed()
    run(module, data, steps, nullcontext())  # warm
    plain = run(module, data, steps, nullcontext())
    counter = FlopCounterMode(display=False)
    run(module, data, steps, counter)
    plain_loss = module.loss_sum

    def loss_sum(*arguments: Any) -> Any:
        with record_function(LOSS):
            return plain_loss(*arguments)

    module.loss_sum = loss_sum
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU])
    slow = run(module, data, steps, profiler)
    del module.loss_sum
    events = list(profiler.events() or [])
    seconds = parts(events, slow.seconds)
    flops = counter.get_total_flops()
    if any(event.name == FLASH for event in events):
        # The counter does not know this kernel: 2 products forward, 5 backward, half of the square.
        blocks = len(module.network.blocks)
        flops += 7 * plain.squares * module.network.hidden_size * blocks
    scores = plain.positions * module.num_items
    loss_flops = 6 * scores * module.network.hidden_size  # scores, and two gradients
    slowdown = slow.seconds / plain.seconds
    rates = {
        "step": (flops / plain.seconds / 1e9, peak, "GFLOP/s"),
        "loss: matrix products": (
            loss_flops / seconds["loss: matrix products"] / 1e9, peak, "GFLOP/s",
        ),
        "loss: max, exp, sums": (
            PASSES * 4 * scores / seconds["loss: max, exp, sums"] / 1e9, bandwidth, "GB/s",
        ),
    }  # fmt: skip
    return {
        "steps": plain.steps, "step_seconds": plain.seconds / plain.steps,
        "step_gflop": flops / plain.steps / 1e9, "loss_share_of_flop": loss_flops / flops,
        "slowdown": slowdown, "parts": {k: s / slow.seconds for k, s in seconds.items()},
        "rates": {k: {"speed": s, "peak": p, "unit": u} for k, (s, p, u) in rates.items()},
    }  # fmt: skip
