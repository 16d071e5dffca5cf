"""A small world for MLLM-MSR's recommender: histories, a catalogue, preferences, and batches of its rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch

from datamodules.loading import AttachLabels, AttachTargets
from datamodules.types import CATALOG_SCHEMA, TRAIN, EvalRows, Histories, ItemWords, Rows

LONGEST = 512
WORDS = ItemWords("film", "films", "watch", "watched")
TITLES = [
    "Heat (1995)",
    "Jaws (1975)",
    'A long "quoted" title, é and all, of many words',
    None,
    "Up",
]
PLOTS = ["Cops.", None, "A shark. " * 40, "Ships", None]
CATALOG = pl.DataFrame(
    {"item_id": list("abcde"), "title": TITLES, "description": PLOTS}
    | {name: [None] * 5 for name in ("categories", "brand", "price", "images")},
    schema=CATALOG_SCHEMA,
)  # fmt: skip
HISTORIES = Histories(
    offsets=np.array([0, 0, 4, 7]),
    items=np.array([1, 2, 3, 4, 2, 1, 3], np.int32),
    split=np.full(7, TRAIN, np.int8),
    timestamps=np.arange(7),
    num_items=5,
)
# Three stretches: user 1's first three events, user 2's first two, user 1 without any.
STRETCHES = (np.array([1, 2, 1]), np.array([0, 4, 0]), np.array([3, 6, 0]))
ROWS = Rows(
    HISTORIES, np.arange(3), *STRETCHES, 0, 0, normaliser=3.0, target=np.array([4, 3, 5]),
    label=np.array([False, True, True]),
)  # fmt: skip
CANDIDATES = np.array([[4, 5, 2, 1], [3, 1, 5, 0], [2, 3, 5, 4]], np.int32)
LIKES = ["tense films about crime, told slowly", 'ships and </s> "sharks"\nYes.', None]


def attached(module: Any) -> Any:
    """As a trainer of one CPU would have it."""
    data = SimpleNamespace(seed=0, prepared=SimpleNamespace(digest="x"))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(
        datamodule=data, strategy=strategy, precision_plugin=None, global_step=0
    )
    module.log = lambda *_, **__: None
    module.configure_model()
    return module.eval()


def ranked(module: Any, candidates: np.ndarray = CANDIDATES) -> Any:
    """A batch of rows that are ranked, as an evaluation loader makes it."""
    rows = replace(ROWS, label=None, candidates=candidates)
    held_out = EvalRows(
        ROWS.user, ROWS.stop, ROWS.target, np.ones((3, 1), dtype=bool), ("all",), np.ones(3),
        candidates=candidates,
    )  # fmt: skip
    module.row_lengths(rows)
    attach = AttachTargets(module.collator(training=False), held_out, mask_seen=True)
    return AttachLabels(attach)(rows)


def labelled(module: Any, training: bool = True) -> Any:
    module.row_lengths(ROWS)
    return AttachLabels(module.collator(training))(ROWS)


def text_of(module: Any, row: int, item: int) -> str:
    one = np.array([row])
    rows = replace(
        ROWS, row=one, user=ROWS.user[one], start=ROWS.start[one], stop=ROWS.stop[one],
        target=np.array([item]), label=None,
    )  # fmt: skip
    (text,) = module.texts(rows, np.zeros(1, np.int64))
    return str(text)
