"""Data for a stage that ranks the whole catalogue beside others that rank drawn candidates."""

from __future__ import annotations

from dataclasses import replace

from datamodules.base import SequenceDataModule
from datamodules.candidates import FullRanking
from datamodules.joined import JoinedDataModule


def whole_catalogue(data: SequenceDataModule) -> SequenceDataModule:
    """The same data, but each held-out item is ranked among all items.

    For a stage's own data: ``{_target_: datamodules.whole_catalogue.whole_catalogue, data: "${data}"}``. Its
    rows stand in a table of their own.

    Raises:
        ValueError: joined data, whose parts have candidates of their own.
    """
    if isinstance(data, JoinedDataModule):
        raise ValueError("joined data have no candidates of their own: set those of its parts")
    data.recipe = replace(data.recipe, candidates=FullRanking())
    return data
