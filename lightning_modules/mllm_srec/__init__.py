"""MLLM-SRec."""

from lightning_modules.mllm_srec.in_one import ReasonsInOneModule
from lightning_modules.mllm_srec.module import MLLMSRecModule

__all__ = ["MLLMSRecModule", "ReasonsInOneModule"]
