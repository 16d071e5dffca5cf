"""FPMC: matrix factorisation plus a factorised Markov chain."""

from lightning_modules.fpmc.module import FPMCModule

__all__ = ["FPMCModule"]
