"""Caser: convolutions over the last L items of every position, beside a vector of the user.

Tang and Wang, "Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding" (WSDM
2018, arXiv 1809.07426). Every position of a history is computed in one pass: a filter that slides over
the history gives the values of all windows at once, and a window's maximum is a pooled slice of them.

Legend: B rows, T history length, N positions, I items, U users, L window, d width, n_v vertical filters,
n_h horizontal filters a height, F = n_v d + L n_h features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Caser(nn.Module):
    """States whose dot product with ``item_vectors()`` scores the next item.

    Args:
        num_items: items 1..num_items; 0 is padding.
        num_users: users 1..num_users; 0 is padding.
        window: L, items that a state depends on (Markov order of the paper).
        hidden_size: width d of items and users.
        vertical_filters: n_v weighted sums of the L items' vectors (paper: 4).
        horizontal_filters: n_h filters for every height 1..L (paper: 16 on MovieLens).
        dropout: on the F features (paper: 0.5).

    Raises:
        ValueError: a size below 1; every one is named.
    """

    def __init__(
        self,
        num_items: int,
        num_users: int,
        window: int = 5,
        hidden_size: int = 50,
        vertical_filters: int = 4,
        horizontal_filters: int = 16,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        sizes = {
            "num_items": num_items, "num_users": num_users, "window": window,
            "hidden_size": hidden_size, "vertical_filters": vertical_filters,
            "horizontal_filters": horizontal_filters,
        }  # fmt: skip
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
        if wrong:
            raise ValueError(f"Caser needs sizes of at least 1, got {', '.join(wrong)}.")
        self.window = window
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.user_embedding = nn.Embedding(num_users + 1, hidden_size, padding_idx=0)
        self.vertical = nn.Linear(window, vertical_filters, bias=False)
        self.horizontal = nn.ModuleList(
            nn.Conv1d(hidden_size, horizontal_filters, height) for height in range(1, window + 1)
        )
        self.dropout = nn.Dropout(dropout)
        features = vertical_filters * hidden_size + window * horizontal_filters  # F
        self.project = nn.Linear(features, hidden_size)
        self.output_weight = nn.Parameter(torch.empty(num_items + 1, 2 * hidden_size))  # W'
        self.output_bias = nn.Parameter(torch.zeros(num_items + 1))  # b'
        self._initialise(hidden_size)

    def _initialise(self, width: int) -> None:
        """Normal tables of deviation 1 / width, as in the authors' code; zero padding rows."""
        for table in (self.item_embedding.weight, self.user_embedding.weight, self.output_weight):
            nn.init.normal_(table, std=1 / table.shape[1])
            with torch.no_grad():
                table[0].zero_()

    def features(self, padded: Tensor) -> Tensor:
        """Convolutional features (B, T, F) of every window of L items; section 3.2 of the paper.

        Args:
            padded: (B, L - 1 + T) item ids; output t reads ids t .. t + L - 1, and a 0 has a zero vector.
        """
        x = self.item_embedding(padded)  # (B, L - 1 + T, d)
        windows = x.unfold(1, self.window, 1)  # (B, T, d, L)
        found = [self.vertical(windows).flatten(2)]  # (B, T, d * n_v)
        channels = x.transpose(1, 2)  # (B, d, L - 1 + T)
        for height, filters in enumerate(self.horizontal, start=1):
            values = F.relu(filters(channels))  # (B, n_h, L - height + T)
            best = F.max_pool1d(values, self.window - height + 1, stride=1)  # (B, n_h, T)
            found.append(best.transpose(1, 2))
        return torch.cat(found, dim=2)

    def states(self, features: Tensor, users: Tensor) -> Tensor:
        """[z, p_u, 1] (N, 2d + 1), section 3.3 of the paper; the 1 multiplies the item's bias.

        Args:
            features: (N, F).
            users: (N, d) vectors of the positions' users.
        """
        z = F.relu(self.project(self.dropout(features)))  # (N, d)
        return torch.cat([z, users, torch.ones_like(z[:, :1])], dim=1)

    def every_window(self, history: Tensor) -> Tensor:
        """Features (B, T, F) of the windows that end at each position of ``history`` (B, T)."""
        return self.features(F.pad(history, (self.window - 1, 0)))

    def last_window(self, history: Tensor, length: Tensor) -> Tensor:
        """Features (B, F) of the windows that end at each row's newest item; zeros fill a short one."""
        back = torch.arange(-self.window, 0, device=history.device)  # (L,)
        place = length[:, None] + back  # (B, L)
        newest = history.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)
        return self.features(newest)[:, 0]

    def item_vectors(self) -> Tensor:
        """The output table [W', b'] (I + 1, 2d + 1); row 0 is padding and stays zero."""
        return torch.cat([self.output_weight, self.output_bias[:, None]], dim=1)
