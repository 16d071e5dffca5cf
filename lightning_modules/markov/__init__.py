"""First-order Markov chain."""

from lightning_modules.markov.module import MarkovModule

__all__ = ["MarkovModule"]
