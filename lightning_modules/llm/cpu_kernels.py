"""What bitsandbytes 0.50 gets wrong on CPUs without saying so, and how a loaded model is kept from it."""

from __future__ import annotations

from typing import Any

import torch

from lightning_modules.errors import ModelError


def mind_cpu_kernels(model: Any, device: torch.device) -> None:
    """Refuse weights that a CPU would unpack wrongly, and keep the others as they are packed.

    The kernel that unpacks starts a block with every row, though the one that packs lets blocks run on; rows
    of an odd width go another way, which is right.

    Raises:
        ModelError: the rows of a layer end inside a block of 4 bits.
    """
    for name, layer in model.named_modules():
        block = getattr(getattr(layer, "weight", None), "blocksize", None)
        if (
            device.type == "cpu"
            and block
            and layer.in_features % 2 == 0
            and layer.in_features % block
        ):
            raise ModelError(
                f"{name} has {layer.in_features} inputs, no whole number of blocks of {block} weights, which "
                "bitsandbytes unpacks wrongly on a CPU: take a smaller llm.block_size, llm.quantization=null "
                "(names without _nf4), or a GPU."
            )
        # On CPUs with AVX512_BF16 a layer's weight is repacked in eval mode: from then on no gradient passes,
        # and the state dict is wrong (bitsandbytes issue 2078).
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
