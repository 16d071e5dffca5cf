"""EASE: a linear item-item model in closed form."""

from lightning_modules.ease.module import EASEModule

__all__ = ["EASEModule"]
