"""What a device computes natively."""

from __future__ import annotations

import torch


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for products in bfloat16; others emulate them, many times slower."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
