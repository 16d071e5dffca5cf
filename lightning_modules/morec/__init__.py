"""MoRec."""

from lightning_modules.morec.module import MoRecModule

__all__ = ["MoRecModule"]
