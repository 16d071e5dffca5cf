"""Rounding a layer's weights so that their errors make up for each other.

Rounded one by one, each weight loses what it loses. Here the columns of a layer are rounded one after the
other, and what one loses the later ones take over, so that the layer's outputs stay what they were (GPTQ:
Frantar et al., ICLR 2023, arXiv 2210.17323, algorithm 1; that the largest inputs come first, and that scales
are set before, are options of its code).

Legend: O outputs and I inputs of a linear layer, G values of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.02  # of the mean of the products' diagonal, added to it
_SHARES = (0.7, 1.1, 17)  # scales that are tried, of a block's largest weight: from, to, how many
_COLUMNS = 64


def round_weight(weight: Tensor, products: Tensor, grid: Tensor, block_size: int) -> Tensor:
    """A layer's weights on the grid, times a scale for each block; each block's largest is at an end of it.

    So bitsandbytes, whose scale is a block's largest weight, finds the same scales and the same values. The
    columns whose inputs are largest are rounded first, when there are most others to make up for them.

    Args:
        weight: (O, I).
        products: (I, I) float64, the sum of x x^T over the layer's inputs x.
        grid: (G,) ascending, from -1 to 1.
        block_size: a divisor of I.

    Returns:
        (O, I) of the weight's type.
    """
    width = weight.shape[1]
    left, grid = weight.to(products), grid.to(products)  # (O, I) is still to be rounded
    sizes = products.diagonal()  # (I,)
    scales, largest = _scales(left, sizes, grid, block_size)  # (O, I / block) each
    ends = left.gather(1, largest).sign() * scales
    order = sizes.argsort(descending=True, stable=True)
    columns = order.tolist()
    # How an error in a column is made up for by the later ones: rows of the inverse's Cholesky factor.
    damped = products + torch.eye(width).to(products) * (DAMPING * sizes.mean()).clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    pull = torch.linalg.cholesky(inverse, upper=True)  # (I, I)
    left, found = left[:, order], torch.empty_like(left)
    for start in range(0, width, _COLUMNS):  # as algorithm 1: the far columns are told once a block
        stop = min(start + _COLUMNS, width)
        errors = torch.empty_like(left[:, start:stop])
        for place in range(start, stop):
            column, block = columns[place], columns[place] // block_size
            value = _nearest(left[:, place], scales[:, block], grid)
            value = torch.where(largest[:, block] == column, ends[:, block], value)
            error = (left[:, place] - value) / pull[place, place]  # (O,)
            left[:, place:stop] -= error[:, None] * pull[place, place:stop]
            found[:, column], errors[:, place - start] = value, error
        left[:, stop:] -= errors @ pull[start:stop, stop:]
    return found.to(weight.dtype)


def _scales(weight: Tensor, sizes: Tensor, grid: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """For each block the scale that loses least, and its largest weight's column, (O, I / block) each."""
    blocks = weight.unflatten(1, (-1, block_size))  # (O, I / block, block)
    weights = sizes.view(-1, block_size)
    most, places = blocks.abs().max(-1)
    most = most.clamp_min(1e-12)
    best, least = most, torch.full_like(most, torch.inf)
    for share in torch.linspace(*_SHARES).tolist():
        scale = most * share
        lost = _nearest(blocks, scale[..., None], grid).sub_(blocks).square_().mul_(weights).sum(-1)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    columns = places + torch.arange(len(weights), device=weight.device) * block_size
    return best, columns


def _nearest(values: Tensor, scale: Tensor, grid: Tensor) -> Tensor:
    """The value of the scaled grid that is nearest to each."""
    between = (grid[1:] + grid[:-1]) / 2
    return grid[torch.bucketize(values / scale, between)] * scale
