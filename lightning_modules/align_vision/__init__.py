"""The projector of a vision-language model, trained alone: LLaVA's first stage (arXiv 2304.08485)."""

from lightning_modules.align_vision.module import AlignVisionModule

__all__ = ["AlignVisionModule"]
