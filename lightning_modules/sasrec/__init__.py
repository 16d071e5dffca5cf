"""SASRec."""

from lightning_modules.sasrec.module import SASRecModule

__all__ = ["SASRecModule"]
