"""Which histories the rows of a data set show, each once: what is written of one serves all of its rows.

Legend: R rows, H histories. A history is ``items[start:stop]`` of one user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodules.loading import EvalDataset
from datamodules.types import SPLIT_NAMES, TEST, TRAIN, VALID, Rows

if TYPE_CHECKING:
    from datamodules.base import SequenceDataModule


def row_histories(data: SequenceDataModule) -> dict[str, Rows]:
    """The histories of the labelled training examples, if there are any, and of held-out rows.

    Returns:
        For ``train``, ``valid`` and ``test`` distinct (user, start, stop), ascending, as loaders hand them
        to a method; ``row`` numbers them, and there is nothing that is asked about.
    """
    examples = data.prepared.examples()
    none = np.zeros(0, np.int64)
    columns = {TRAIN: (none, none, none)}
    if examples is not None:
        columns[TRAIN] = (examples.user, examples.start, examples.stop)
    for code in (VALID, TEST):
        rows = EvalDataset(data.histories, data.rows(code), data.seed).every()
        columns[code] = (rows.user, rows.start, rows.stop)
    return {SPLIT_NAMES[code]: _distinct(data, *found) for code, found in columns.items()}


def _distinct(
    data: SequenceDataModule, user: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> Rows:
    """(R,) columns -> H rows."""
    found = np.unique(np.stack([user, start, stop], axis=1).astype(np.int64), axis=0)  # (H, 3)
    return Rows(
        data.histories, np.arange(len(found)), found[:, 0], found[:, 1], found[:, 2], 0, data.seed,
        liked_above=data.liked_above,
    )  # fmt: skip
