"""HSTU."""

from lightning_modules.hstu.module import HSTUModule

__all__ = ["HSTUModule"]
