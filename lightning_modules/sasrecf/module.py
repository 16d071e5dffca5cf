"""SASRecF as a system: SASRec's network, whose items are ids and features."""

from __future__ import annotations

from lightning_modules.item_features import FeatureModule
from lightning_modules.sasrec import SASRecModule


class SASRecFModule(FeatureModule, SASRecModule):
    """SASRec with item features, as in RecBole (Zhao et al., CIKM 2021, arXiv 2011.01731).

    RecBole maps the id's vector and one mean vector a column to the width of the network, and scores with the
    ids' table (``fusion=concat tie=ids``). Here an item's features are one mean over all columns.

    Args: those of ``FeatureModule`` and of ``SASRecModule``.
    """
