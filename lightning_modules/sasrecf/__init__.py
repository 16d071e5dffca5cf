"""SASRecF."""

from lightning_modules.sasrecf.module import SASRecFModule

__all__ = ["SASRecFModule"]
