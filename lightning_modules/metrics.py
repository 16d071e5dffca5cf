"""``RankingMetrics``: means per group of rows and their standard errors; all metrics by name.

The definitions are pure functions in ``expected.py`` (rank counts, candidate lists) and ``auc.py``
(pooled pairs); ``ranking.py`` turns scores into counts, and raises on NaN.

Legend: B rows, G groups, M metrics, k cutoff.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.auc import LogitAUC, grouped_auc
from lightning_modules.expected import (
    as_counts,
    expected_auc,
    expected_hit,
    expected_mrr,
    expected_ndcg,
    list_metrics,
    row_metrics,
)

__all__ = [
    "METRICS_VERSION",
    "LogitAUC",
    "RankingMetrics",
    "expected_auc",
    "expected_hit",
    "expected_mrr",
    "expected_ndcg",
    "grouped_auc",
    "list_metrics",
    "row_metrics",
]

METRICS_VERSION = "1"  # part of the protocol fingerprint: raise it when a definition changes

# Contributions are rounded to this grid, so that float64 sums of them are exact up to 2^21 rows and
# come out the same to the last bit on any number of devices. It moves a mean by 1e-10 at most.
_GRID = 2.0**32
_USER_AVERAGED = ("recall@", "uauc")


def on_grid(values: Tensor) -> Tensor:
    """Float64 values rounded to the grid on which their sums are exact."""
    return (values * _GRID).round() / _GRID


class RankingMetrics(Metric):
    """Means of ``row_metrics`` per group of rows, and their standard errors, in constant memory.

    hit, ndcg and mrr weigh every row the same. recall and uauc weigh every user the same, through
    ``weight`` = 1 / rows of that user; rows whose target is the only candidate have no uauc. Sums
    are exact and do not depend on the order or the device of the rows.
    """

    full_state_update = False
    higher_is_better = True
    totals: Tensor
    rows: Tensor

    def __init__(
        self,
        ks: Sequence[int] = (1, 5, 10, 20),
        group_names: Sequence[str] = ("all",),
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
            raise ValueError(f"ks must be distinct cutoffs of at least 1, got {list(ks)}.")
        self.ks, self.group_names = tuple(ks), tuple(group_names)
        one = torch.zeros(1, dtype=torch.int64)
        self.names = tuple(row_metrics(one, one, one + 1, ks))  # M names
        shape = (len(self.group_names), len(self.names), 6)
        zeros = torch.zeros(shape, dtype=torch.float64)  # (G, M, 6)
        self.add_state("totals", zeros, dist_reduce_fx="sum")
        self.add_state("rows", zeros[:, 0, 0].clone(), dist_reduce_fx="sum")  # (G,)
        self._errors: dict[str, Tensor] = {}

    def update(
        self,
        above: Tensor,
        ties: Tensor,
        count: Tensor,
        groups: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        """Add rows: counts (B,), groups (B, G) bool, weight (B,) or None for 1 each.

        Raises:
            ValueError: shapes do not fit, or a row has above + ties >= count.
        """
        above, ties, count = as_counts(above, ties, count)
        if groups.shape != (len(above), len(self.group_names)):
            raise ValueError(
                f"groups is {tuple(groups.shape)}, expected (rows, groups) = "
                f"({len(above)}, {len(self.group_names)}) for the groups {self.group_names}."
            )
        if bool((above + ties >= count).any()):
            raise ValueError(
                "A row has above + ties >= count; count must include the target itself."
            )
        values = row_metrics(above, ties, count, self.ks)
        v = torch.stack([values[name] for name in self.names], dim=1)  # (B, M)
        rows = v.new_ones(len(v)) if weight is None else weight.to(v)
        user_averaged = torch.tensor(
            [n.startswith(_USER_AVERAGED) for n in self.names], device=v.device
        )
        w = torch.where(user_averaged, rows[:, None], 1.0) * v.isfinite()  # (B, M)
        v = v.nan_to_num()
        terms = torch.stack([(w > 0).double(), w, w * w, w * v, w * w * v, w * w * v * v], dim=2)
        member = groups.to(v)  # (B, G)
        self.totals += torch.einsum("bg,bmx->gmx", member, on_grid(terms))
        self.rows += member.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """``group/metric`` -> () float64, with ``group/n`` rows; NaN where a group is empty."""
        n, w, ww, wv, wwv, wwvv = self.totals.unbind(dim=2)  # (G, M) each
        mean = wv / w
        spread = (wwvv - 2 * mean * wwv + mean * mean * ww).clamp(min=0)
        error = (n / (n - 1) * spread).sqrt() / w
        means: dict[str, Tensor] = {}
        self._errors = {}
        for g, group in enumerate(self.group_names):
            means[f"{group}/n"] = self.rows[g].clone()
            for m, name in enumerate(self.names):
                means[f"{group}/{name}"] = mean[g, m]
                self._errors[f"{group}/{name}"] = error[g, m]
        return means

    def stderr(self) -> dict[str, Tensor]:
        """``group/metric`` -> standard error of the mean, () float64 (95 % interval: +- 1.96).

        sqrt(n / (n - 1) * sum w^2 (v - mean)^2) / sum w; NaN with fewer than two rows. Rows count
        as independent, which understates the error where users have many rows.
        """
        self.compute()  # the wrapped call also sums over the ranks
        return dict(self._errors)

    def compute_with_error(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``group/metric`` -> (mean, standard error), without ``group/n``."""
        means, errors = self.compute(), self.stderr()
        return {name: (means[name], error) for name, error in errors.items()}
