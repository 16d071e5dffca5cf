"""GRU4RecF as a system: GRU4Rec's network, whose items are ids and features."""

from __future__ import annotations

from lightning_modules.gru4rec import GRU4RecModule
from lightning_modules.item_features import FeatureModule


class GRU4RecFModule(FeatureModule, GRU4RecModule):
    """GRU4Rec with item features, the "concatenated input" of Hidasi et al. (RecSys 2016).

    Hidasi, Quadrana, Karatzoglou and Tikk, "Parallel Recurrent Neural Network Architectures for Feature-rich
    Session-based Recommendations". One GRU reads ids and features together. RecBole's GRU4RecF is their
    "parallel" architecture instead: a second GRU reads the features, and both outputs are concatenated; it
    scores with the ids' table (``tie=ids``).

    Args: those of ``FeatureModule`` and of ``GRU4RecModule``.
    """
