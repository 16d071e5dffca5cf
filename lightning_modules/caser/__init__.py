"""Caser."""

from lightning_modules.caser.module import CaserModule

__all__ = ["CaserModule"]
