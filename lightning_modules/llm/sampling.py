"""Texts that are drawn, not chosen: the same ones whatever rows stand beside a row.

Legend: B rows, V tokens of the vocabulary, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: logits are divided by it.
        top_p: of the likeliest tokens, those that together reach this probability are drawn from (Holtzman
            et al., "The Curious Case of Neural Text Degeneration", ICLR 2020, arXiv 1904.09751).
        seed: of the draws.

    Raises:
        ValueError: a temperature that is not above 0, or a ``top_p`` that is no share.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling got temperature={self.temperature}, top_p={self.top_p}: expected a temperature "
                "above 0 (without sampling the likeliest token is written) and 0 < top_p <= 1"
            )


class RowSampler:
    """Leaves each row one token, drawn with random numbers of its own; a processor of transformers' logits.

    transformers draws all rows of a batch from one stream, so that a text would depend on its neighbours.

    Args:
        sampling: how.
        names: (B,) hexadecimal; a row's name is its stream.
    """

    def __init__(self, sampling: Sampling, names: Sequence[str]) -> None:
        self.sampling = sampling
        seeds = [int(name[:15], 16) for name in names]
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) behind tokens (B, L): minus infinity at all tokens but the drawn one."""
        drawn = [torch.rand((), generator=stream, dtype=torch.float64) for stream in self.streams]
        uniform = torch.stack(drawn).to(scores.device, torch.float32)  # (B,)
        token = draw(scores.float() / self.sampling.temperature, self.sampling.top_p, uniform)
        one = torch.full_like(scores, -torch.inf)
        return one.scatter_(1, token[:, None], 0.0)


def draw(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """The token (B,) of each row that the number ``uniform`` (B,) in [0, 1) falls on.

    The likeliest token comes first on the line, and is always among those drawn from.

    Args:
        logits: (B, V).
        top_p: see ``Sampling``.
        uniform: (B,).
    """
    chances, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)  # (B, V)
    before = chances.cumsum(-1) - chances  # (B, V) of the tokens before each one
    kept = torch.where(before < top_p, chances, 0.0)
    ends = kept.cumsum(-1)
    place = (ends <= uniform[:, None] * ends[:, -1:]).sum(-1)  # (B,)
    last = (kept > 0).sum(-1) - 1  # rounding must not lead beyond the tokens that are kept
    return order.gather(1, torch.minimum(place, last)[:, None]).squeeze(1)
