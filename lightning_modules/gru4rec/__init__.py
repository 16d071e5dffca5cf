"""GRU4Rec."""

from lightning_modules.gru4rec.module import GRU4RecModule

__all__ = ["GRU4RecModule"]
