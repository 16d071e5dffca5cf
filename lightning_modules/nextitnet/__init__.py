"""NextItNet."""

from lightning_modules.nextitnet.module import NextItNetModule

__all__ = ["NextItNetModule"]
