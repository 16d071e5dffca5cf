"""Gradients of four ranks are the same however they lie in buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.reduction import mean_in_float64
from tests.ranks import in_ranks

RANKS, WIDE = 4, 257


class Backwards(nn.Module):
    """Layers are used in another order than they stand in: the second step's buckets are laid out anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layers[i] for i in (1, 2, 0)):
            x = layer(x).tanh()
        return x.square().mean()


def one_rank(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = Backwards()
    x = torch.randn(16, WIDE, generator=torch.Generator().manual_seed(rank))  # (rows, WIDE)
    model(x).backward()
    found = {"own": [p.grad.clone() for p in model.parameters()]}
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(None, mean_in_float64)
    for step in ("first", "second", "third"):
        model.zero_grad()
        ddp(x).backward()
        found[step] = [p.grad.clone() for p in model.parameters()]
    torch.save(found, folder / f"{rank}.pt")


def test_the_mean_of_four_ranks_has_one_value_in_every_step(tmp_path: Path) -> None:
    in_ranks(RANKS, one_rank, tmp_path)
    told = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for place in range(6):
        own = np.stack([t["own"][place].numpy().astype(np.float64) for t in told])  # (RANKS, ...)
        expected = torch.from_numpy(own.mean(0).astype(np.float32))
        assert (own[0] != own[1]).any()
        for found in told:
            assert all(torch.equal(found[s][place], expected) for s in ("first", "second", "third"))
