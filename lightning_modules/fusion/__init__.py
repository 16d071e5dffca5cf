"""Two models' scores mixed by how often each candidate was trained on."""

from lightning_modules.fusion.module import FusionModule

__all__ = ["FusionModule"]
