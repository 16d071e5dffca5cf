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


class LogitAUC(Metric):
    """Exact AUC over pooled (score, label) pairs, and the mean of the users' own AUCs.

    Takes raw scores (yes-logit minus no-logit): no sigmoid, ties count half, equal to scikit-learn.
    """

    full_state_update = False
    higher_is_better = True
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
        both = each[each.isfinite()]
        out["uauc"] = both.mean()
        out["users"] = empty.new_tensor(len(both))
        out["users_one_class"] = empty.new_tensor(len(each) - len(both))
        return out
