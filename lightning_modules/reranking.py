"""Methods that rank a whole catalogue by way of another method's shortlists."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from datamodules.types import Batch
from lightning_modules.base import TOP_K, RankingModule, ScoredBatch
from lightning_modules.errors import ModelError
from lightning_modules.shortlists import Shortlists


class RerankingModule(RankingModule):
    """A method to which scoring an item costs so much that it is asked about some of a catalogue only.

    Args:
        shortlist: the scores file of another method's test of the whole catalogue: then this one's test
            orders the first ``shortlist_items`` of its lists, see ``Shortlists``. None scores all.
        options: see ``RankingModule``.

    Raises:
        ValueError: ``shortlist_items`` is below 1.
    """

    def __init__(
        self, shortlist: str | None = None, shortlist_items: int = TOP_K, **options: Any
    ) -> None:
        super().__init__(**options)
        if shortlist_items < 1:
            raise ValueError(f"shortlist_items must be at least 1, got {shortlist_items}")
        self.shortlist, self.shortlist_items = shortlist, shortlist_items

    @cached_property
    def shortlists(self) -> Shortlists:
        """Those that the test's rows are chosen from."""
        assert self.shortlist is not None
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return Shortlists.read(self.shortlist, data.prepared.items["item_id"], self.shortlist_items)

    def test_step(self, batch: Batch, batch_index: int) -> ScoredBatch:  # type: ignore[override]
        """As every method's; or where the targets stand in the catalogue, of which a shortlist is scored.

        Raises:
            ModelError: the rows have candidates or labels of their own; or see ``Shortlists``.
        """
        if self.shortlist is None:
            return super().test_step(batch, batch_index)
        if batch.candidates is not None or batch.label is not None:
            raise ModelError(
                "a shortlist is of the whole catalogue, and this test asks about other items: give its stage "
                'data: {_target_: datamodules.whole_catalogue.whole_catalogue, data: "${data}"}'
            )
        at, items = self.shortlists.of(batch)  # (B, N)
        counts = self.shortlists.counts(batch, at, items, self.score(self.encode(batch), items))
        self._count("test", batch, counts, None)
        return ScoredBatch(batch, counts, None)

    def remarks(self) -> list[str]:
        """How many targets there were to be found."""
        if "shortlists" not in vars(self):
            return super().remarks()
        found = self.shortlists.retrieved
        told = f"{found.sum():,} of {len(found):,} targets are among the {self.shortlists.items.shape[1]}"
        return [f"{told} items of their rows' shortlists; no other can move", *super().remarks()]
