"""``PredictingModule``: what a ``run: predict`` stage runs, whose outcome later stages read as a table."""

from __future__ import annotations

from abc import abstractmethod

import polars as pl

from lightning_modules.generations import Generations
from lightning_modules.stage_module import StageModule


class PredictingModule(StageModule):
    """Goes through numbered things of the data (items, users) and keeps what it finds out about each.

    ``predict_step`` is given some numbers (B,), each once over all devices. What it finds it keeps in
    ``generations``, which a callback stores, so that a stage that was cut off goes on where it stood.
    """

    generations: Generations | None = None

    @property
    @abstractmethod
    def numbered(self) -> int:
        """How many things there are: their numbers are 0, 1, ..., one less than this."""

    @abstractmethod
    def table(self) -> pl.DataFrame:
        """What was found, a line a thing; asked for once all of them were predicted, by any device."""
