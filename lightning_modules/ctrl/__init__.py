"""CTRL."""

from lightning_modules.ctrl.alignment import CTRLAlignmentModule
from lightning_modules.ctrl.module import CTRLModule

__all__ = ["CTRLAlignmentModule", "CTRLModule"]
