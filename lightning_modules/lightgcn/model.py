"""LightGCN: embeddings of users and items, averaged over the neighbours of a bipartite graph.

He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation" (SIGIR 2020,
arXiv 2002.02126). torch_geometric's ``LGConv`` computes the same propagation; it was weighed and left out,
being a heavy dependency for one product of a sparse matrix with a table, which torch has.

Legend: V nodes = (U + 1) users, then (I + 1) items, E pairs, K layers, d width.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.samplers import event_keys
from datamodules.types import TRAIN, Histories


def normalised_graph(histories: Histories) -> Tensor:
    """D^-1/2 A D^-1/2 of the distinct training pairs, sparse CSR (V, V) float32, symmetric.

    Equation 3: an edge between user u and item i weighs 1 / sqrt(degree(u) degree(i)).
    """
    users, width = histories.num_users + 1, histories.num_items + 1
    keys = event_keys(histories, TRAIN)
    user, item = keys // width, users + keys % width  # (E,) nodes
    degree = np.bincount(np.concatenate([user, item]), minlength=users + width)  # (V,)
    weight = 1 / np.sqrt(degree[user].astype(np.float64) * degree[item])
    # Keys ascend by user, so users' rows are in order as they are; items' rows need a stable sort.
    order = np.argsort(item, kind="stable")
    columns = np.concatenate([item, user[order]])  # (2 E,)
    values = np.concatenate([weight, weight[order]]).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(degree)])  # (V + 1,)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(offsets), torch.from_numpy(columns), torch.from_numpy(values),
            (len(degree), len(degree)), check_invariants=True,
        )  # fmt: skip


class LightGCN(nn.Module):
    """The tables at layer 0, and their propagation.

    Args:
        num_users, num_items: U and I; the first row of each part is padding and zero.
        hidden_size: width d.
        num_layers: K; 0 is matrix factorisation.
        init_std: standard deviation of the first values.

    Raises:
        ValueError: ``hidden_size`` is below 1, or ``num_layers`` below 0.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        hidden_size: int = 64,
        num_layers: int = 3,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_layers < 0:
            raise ValueError(
                "hidden_size must be at least 1 and num_layers at least 0, "
                f"got {hidden_size} and {num_layers}"
            )
        self.num_users, self.num_layers = num_users, num_layers
        self.nodes = nn.Parameter(init_std * torch.randn(num_users + num_items + 2, hidden_size))
        with torch.no_grad():
            self.nodes[0] = 0
            self.nodes[num_users + 1] = 0

    def split(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(V, d) -> users (U + 1, d) and items (I + 1, d)."""
        return nodes[: self.num_users + 1], nodes[self.num_users + 1 :]

    def forward(self, graph: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of layers 0..K, E_(k+1) = graph E_k: users (U + 1, d) and items (I + 1, d)."""
        layer: Tensor = self.nodes
        total: Tensor = self.nodes
        # Sparse products have no half precision on every device, and sums over neighbours want the digits.
        with torch.autocast(layer.device.type, enabled=False):
            for _ in range(self.num_layers):
                layer = graph.to(layer.dtype) @ layer
                total = total + layer
        return self.split(total / (self.num_layers + 1))
