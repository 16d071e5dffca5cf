"""How good log-odds are as probabilities, and what answers in words were: metrics of labelled rows.

Legend: N rows, M bins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_modules.metrics import on_grid
from lightning_modules.ranking import require_no_nan


class Calibration(Metric):
    """Calibration of sigmoid(margin), in constant memory: ECE, Brier score, log loss, and the share of yes.

    ``ece``: sum over bins of n_m / N * |share liked - mean probability|, the expected calibration error with
    M = 15 bins of equal width, each closed above, as Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017 (arXiv 1706.04599), eq. 3. The probability of yes is binned (the reliability diagram of
    Niculescu-Mizil & Caruana, ICML 2005), not that of the likelier answer. ``brier``: mean (p - y)^2 (Brier,
    1950). ``log_loss``: mean -log p(y) in nats, from the margin itself, so that nothing is clipped.
    ``yes_rate``: share of rows with a margin above 0.

    ``refusal_rate``: share of rows that were not answered, where ``refusals`` asks for it. Their margins
    count in all the others, as in AUC.

    Once computed, ``curve`` is the reliability curve of all ranks' rows; a bin without rows has no line.

    Sums are of numbers on a grid (``on_grid``), so that they do not depend on order or devices.

    Args:
        bins: M.
        refusals: whether rows tell if they were answered.

    Raises:
        ValueError: no bin.
    """

    full_state_update = False
    lower_is_better = ("ece", "brier", "log_loss")
    names = (*lower_is_better, "yes_rate")
    per_bin: Tensor
    totals: Tensor
    refused: Tensor

    def __init__(self, bins: int = 15, refusals: bool = False, **kwargs: object) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"calibration needs at least 1 bin, got {bins}")
        self.bins, self.refusals = bins, refusals
        zeros = torch.zeros(bins, 3, dtype=torch.float64)  # (M, 3): rows, probability, liked
        self.add_state("per_bin", zeros, dist_reduce_fx="sum")
        self.add_state("totals", zeros[0].clone(), dist_reduce_fx="sum")  # Brier, log loss, yes
        self.add_state("refused", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.curve: list[dict[str, float]] = []

    def update(self, margins: Tensor, labels: Tensor, answered: Tensor | None = None) -> None:
        """Add rows: log-odds (N,), labels (N,), bool or 0/1, and whether each was answered (N,), bool.

        Raises:
            ValueError: a margin is NaN, or ``answered`` is missing where refusals count.
        """
        require_no_nan(margins[:, None])
        if self.refusals:
            if answered is None:
                raise ValueError("refusals are counted, and rows do not tell if they were answered")
            self.refused += (~answered).sum()
        m, y = margins.detach().double(), labels.double()
        p = m.sigmoid()
        edges = torch.arange(1, self.bins, dtype=torch.float64, device=p.device) / self.bins
        place = torch.bucketize(p, edges)  # (N,); an edge belongs to the bin below it
        row = torch.stack([torch.ones_like(p), on_grid(p), y], dim=1)
        self.per_bin.index_add_(0, place, row)
        loss = F.softplus(torch.where(labels.bool(), -m, m))
        each = torch.stack([on_grid((p - y) ** 2), on_grid(loss), (m > 0).double()], dim=1)
        self.totals += each.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """``names``, and ``refusal_rate`` if asked for -> () float64; NaN without rows."""
        rows, probability, liked = self.per_bin.unbind(1)
        count = rows.sum()
        brier, loss, yes = (self.totals / count).unbind()
        ece = (liked - probability).abs().sum() / count
        self.curve = [
            {
                "bin": m + 1,
                "above": m / self.bins,
                "up_to": (m + 1) / self.bins,
                "count": int(n),
                "mean_probability": p / n,
                "share_liked": y / n,
            }
            for m, (n, p, y) in enumerate(self.per_bin.tolist())
            if n
        ]
        found = dict(zip(self.names, (ece, brier, loss, yes), strict=True))
        return {**found, "refusal_rate": self.refused / count} if self.refusals else found


class AnswerRates(Metric):
    """What answers in words were: shares of all rows.

    ``refusal_rate``: neither label, or none of the list. ``yes_rate``: yes, where ``asks_yes``.

    Args:
        asks_yes: whether answers are a yes or a no.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, asks_yes: bool = True, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.asks_yes = asks_yes
        zeros = torch.zeros(3, dtype=torch.int64)  # rows, yes, refused
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, answers: Tensor) -> None:
        """Add rows (N,): above 0 a yes, below 0 a no, 0 a refusal."""
        found = (torch.ones_like(answers, dtype=torch.bool), answers > 0, answers == 0)
        self.counts += torch.stack([kind.sum() for kind in found])

    def compute(self) -> dict[str, Tensor]:
        """() float64; NaN without rows."""
        rows, yes, refused = self.counts.double().unbind()
        told = {"refusal_rate": refused / rows}
        return {"yes_rate": yes / rows, **told} if self.asks_yes else told
