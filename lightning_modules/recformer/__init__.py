"""RECFORMER."""

from lightning_modules.recformer.module import RecformerModule
from lightning_modules.recformer.pretraining import RecformerPretrainingModule

__all__ = ["RecformerModule", "RecformerPretrainingModule"]
