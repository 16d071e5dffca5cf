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

    def predict_batches(self, size: int, rank: int, world_size: int) -> list[list[int]]:
        """The numbers of one device in batches of at most ``size``, in the order of the work.

        Nobody waits for another device between batches: what a number depends on comes before it here.
        """
        mine = list(range(rank, self.numbered, world_size))
        return [mine[at : at + size] for at in range(0, len(mine), size)]

    @abstractmethod
    def table(self) -> pl.DataFrame:
        """What was found, a line a thing; asked for once all of them were predicted, by any device."""
