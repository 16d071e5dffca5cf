"""The arithmetic of what a run will take; ``tests/recipes/test_preflight.py`` compares it with runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datamodules.samplers import GlobalBatchSampler
from experiments import preflight
from experiments.calibrate import fit_length
from experiments.errors import UserError
from experiments.few_batches import STEPS, few_steps


@pytest.mark.parametrize(
    ("trainer", "batches", "micro", "steps", "epochs"),
    [
        ({"max_epochs": 3}, 7, 1, 21, 3),
        ({"max_epochs": 3}, 14, 2, 21, 3),
        ({"max_epochs": 3, "limit_train_batches": 4}, 14, 2, 6, 3),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 14, 2, 12, 3),  # 7 batches are 4 steps
        ({"max_epochs": 3, "max_steps": 10}, 7, 1, 10, 2),
        ({"max_epochs": -1, "max_steps": 10}, 7, 1, 10, 2),
        ({"max_epochs": 1, "max_steps": 100}, 7, 1, 7, 1),
    ],
)
def test_how_long_a_fit_is(
    trainer: dict[str, Any], batches: int, micro: int, steps: int, epochs: int
) -> None:
    assert fit_length({"trainer": trainer}, batches, micro) == (steps, epochs)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_step_that_pads_to_most_is_measured_and_steps_stay_whole(micro_batches: int) -> None:
    lengths = np.arange(1, 101)
    lengths[63] = 1000
    sampler = GlobalBatchSampler(lengths, 4, micro_batches=micro_batches)
    every = list(sampler)
    picked = few_steps(every, sampler)
    assert len(picked) == STEPS * micro_batches
    rows = [b.row.tolist() for b in picked]
    first = [row for batch in rows[:micro_batches] for row in batch]
    assert 63 in first, "the longest comes first, where memory is measured"
    whole = [b.row.tolist() for b in every]
    for at in range(0, len(rows), micro_batches):
        start = whole.index(rows[at])
        assert start % micro_batches == 0
        assert rows[at : at + micro_batches] == whole[start : start + micro_batches]
    assert len({tuple(r) for r in rows}) == len(rows), "no step twice"


def test_limits_are_read_or_refused() -> None:
    assert preflight.limits({}) == (None, None)
    assert preflight.limits({"TIME": "1:00:00", "MEMORY": "24"}) == (3600, 24.0)
    with pytest.raises(UserError, match="MEMORY='much'"):
        preflight.limits({"MEMORY": "much"})


def test_times_as_they_are_told() -> None:
    assert preflight.told_time(59.6) == "0:01:00"
    assert preflight.told_time(3723) == "1:02:03"
    assert preflight.told_time(2 * 86400 + 61) == "2-0:01:01"


def test_a_histogram_shows_every_bin() -> None:
    told = preflight.histogram({"edges": [1, 3, 5, 6], "counts": [1, 0, 8]})
    assert told == "▁ █  (1-2: 1, 3-4: 0, 5-5: 8)"
