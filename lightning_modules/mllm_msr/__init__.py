"""MLLM-MSR."""

from lightning_modules.mllm_msr.module import MLLMMSRModule

__all__ = ["MLLMMSRModule"]
