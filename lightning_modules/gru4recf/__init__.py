"""GRU4RecF."""

from lightning_modules.gru4recf.module import GRU4RecFModule

__all__ = ["GRU4RecFModule"]
