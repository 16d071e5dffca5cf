"""Matrix factorisation: trained on pairs (BPR), and solved for by alternating least squares (iALS)."""

from lightning_modules.mf.module import BPRMFModule, IALSModule

__all__ = ["BPRMFModule", "IALSModule"]
