"""AUC of (score, label) pairs: pooled over everybody, and of each user alone.

torchmetrics' BinaryAUROC squashes logits through a float32 sigmoid, which ties large ones, and
answers 0 when a class is missing; this one is exact and answers NaN.

Legend: N scored pairs, U users.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.ranking import require_no_nan


def grouped_auc(scores: Tensor, labels: Tensor, users: Tensor) -> Tensor:
    """(U,) float64: the AUC of each distinct user in ascending id, NaN where a class is missing.

    Exact for any float scores: AUC = (sum of the positives' mid-ranks - P(P + 1)/2) / (P * N), the
    Mann-Whitney statistic. All inputs are (N,).

    Raises:
        ValueError: a score is NaN.
    """
    require_no_nan(scores[:, None])
    _, level = torch.unique(scores.double(), return_inverse=True)  # (N,) dense ranks
    ids, user = torch.unique(users, return_inverse=True)  # (U,), (N,)
    width = len(scores) + 1
    key, group, size = torch.unique(user * width + level, return_inverse=True, return_counts=True)
    rows = torch.bincount(user, minlength=len(ids))  # (U,)
    before = (rows.cumsum(0) - rows)[key // width]  # rows of earlier users, for each tie group
    mid_rank = (2 * size.cumsum(0) - size + 1 - 2 * before).double() / 2
    positive = labels.bool()
    p = torch.bincount(user[positive], minlength=len(ids)).double()  # (U,)
    total = torch.zeros_like(p).index_add_(0, user[positive], mid_rank[group][positive])
    return (total - p * (p + 1) / 2) / (p * (rows - p))


def bootstrap_errors(
    scores: Tensor, labels: Tensor, users: Tensor, draws: int = 1000, seed: int = 0
) -> dict[str, Tensor]:
    """Standard errors of the pooled AUC (``auc``) and of the users' mean AUC (``uauc``), () float64.

    Users are drawn anew with replacement, each with all of its pairs (the cluster bootstrap: Field & Welsh,
    2007): the pairs of one user are not independent, and there may be few users. Inputs are (N,).

    Args:
        scores, labels, users: as in ``grouped_auc``.
        draws: at most; fewer where there are so many pairs that they would take minutes.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    scores, labels, users = scores.cpu(), labels.cpu().bool(), users.cpu()
    ids, user = torch.unique(users, return_inverse=True)  # (U,), (N,)
    _, level = torch.unique(scores.double(), return_inverse=True)  # (N,)
    each = grouped_auc(scores, labels, users)  # (U,)
    draws = min(draws, max(100, 200_000_000 // max(1, len(scores))))
    at_once = max(1, 10_000_000 // max(1, len(scores)))
    pooled, means = [], []
    for first in range(0, draws, at_once):
        size = (min(at_once, draws - first), len(ids))
        drawn = torch.randint(len(ids), size, generator=generator)  # (D, U)
        times = torch.zeros(size, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))  # how often each user was drawn
        pooled.append(_weighted_auc(times[:, user], labels, level))
        means.append((times * each.nan_to_num()).sum(1) / (times * each.isfinite()).sum(1))
    found = {"auc": torch.cat(pooled), "uauc": torch.cat(means)}
    # A draw may lack a class; it says nothing. No user may have both, and then all draws are such.
    usable = {name: values[values.isfinite()] for name, values in found.items()}
    none = torch.tensor(torch.nan, dtype=torch.float64)
    return {name: v.std() if len(v) > 1 else none for name, v in usable.items()}


def _weighted_auc(weights: Tensor, labels: Tensor, level: Tensor) -> Tensor:
    """(D,) AUCs of pairs that count ``weights`` (D, N) times; ``level`` (N,) are the scores' dense ranks."""
    shape = (len(weights), int(level.max()) + 1)
    positive = weights.new_zeros(shape).index_add_(1, level, weights * labels)  # (D, levels)
    negative = weights.new_zeros(shape).index_add_(1, level, weights * ~labels)
    beaten = negative.cumsum(1) - negative / 2
    return (positive * beaten).sum(1) / (positive.sum(1) * negative.sum(1))


class LogitAUC(Metric):
    """Exact AUC over pooled (score, label) pairs, and the mean of the users' own AUCs.

    Takes raw scores (yes-logit minus no-logit): no sigmoid, ties count half, equal to scikit-learn.
    """

    full_state_update = False
    higher_is_better = True
    _pairs: tuple[Tensor, Tensor, Tensor] | None = None  # of all ranks, once computed
    scores: list[Tensor]
    labels: list[Tensor]
    users: list[Tensor]

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        # A rank without rows contributes an empty 1-D tensor of this dtype; every state has both.
        self.set_dtype(torch.float64)
        for name in ("scores", "labels", "users"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        scores: Tensor,
        labels: Tensor,
        users: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> None:
        """Add pairs, all (N,): scores, labels (bool or 0/1), user ids; not ``keep`` is padding."""
        keep = torch.ones_like(labels, dtype=torch.bool) if keep is None else keep.bool()
        ids = torch.full_like(labels, torch.nan, dtype=torch.float64) if users is None else users
        for value in (scores, ids, keep):
            if value.shape != labels.shape or labels.ndim != 1:
                raise ValueError(
                    f"Expected vectors of {len(labels)} pairs, got {tuple(value.shape)}."
                )
        for state, value in ((self.scores, scores), (self.labels, labels), (self.users, ids)):
            state.append(value.detach()[keep].double())

    def compute(self) -> dict[str, Tensor]:
        """``auc`` and ``n``, as () float64; NaN where a class is missing.

        With user ids also ``uauc``, the mean over ``users`` users; ``users_one_class`` more have
        one class only and are left out.

        Raises:
            ValueError: user ids came with some updates only, or a score is NaN.
        """
        self._pairs = None
        empty = torch.zeros(0, dtype=torch.float64, device=self.device)
        scores, labels, users = (
            torch.cat([empty, *state]) if isinstance(state, list) else state
            for state in (self.scores, self.labels, self.users)
        )
        if len(scores) == 0:
            return {"auc": empty.new_tensor(torch.nan), "n": empty.new_tensor(0.0)}
        pooled = grouped_auc(scores, labels, torch.zeros_like(users))[0]
        out = {"auc": pooled, "n": empty.new_tensor(len(scores))}
        if bool(users.isnan().all()):
            return out
        if bool(users.isnan().any()):
            raise ValueError(
                "Some updates gave user ids and some did not; give them always or never."
            )
        each = grouped_auc(scores, labels, users)  # (U,)
        self._pairs = (scores, labels, users)
        both = each[each.isfinite()]
        out["uauc"] = both.mean()
        out["users"] = empty.new_tensor(len(both))
        out["users_one_class"] = empty.new_tensor(len(each) - len(both))
        return out

    def stderr(self) -> dict[str, Tensor]:
        """``bootstrap_errors`` of what was computed last; nothing where no user ids were given."""
        self.compute()  # the wrapped call also gathers the ranks' pairs
        return bootstrap_errors(*self._pairs) if self._pairs is not None else {}
