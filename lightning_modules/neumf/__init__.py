"""Neural collaborative filtering: NeuMF and its two branches."""

from lightning_modules.neumf.module import NeuMFModule

__all__ = ["NeuMFModule"]
