"""AdamW, with row-wise Adagrad for tables of many rows of which a step touches few.

Legend: V rows of a table, d width, R rows that a step touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


class TableAdamW(AdamW):
    """AdamW whose groups with ``rowwise: True`` are updated by row-wise Adagrad.

    Such a table keeps one number a row, where Adam keeps two a weight, and a step reads and writes only the
    rows that have a gradient: s_v += mean_j g_vj^2, then w_v -= lr g_v / (sqrt(s_v) + eps). Adagrad is that
    of Duchi et al., JMLR 2011; sharing its sum over a row is what recommenders with tables of terabytes do
    (Mudigere et al., ISCA 2022, arXiv 2104.05158). Gradients may be sparse or dense. Weight
    decay is decoupled and acts on the rows touched.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The fused AdamW would take gradients still scaled (16-mixed) and unscale them itself; tables cannot.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Tables first; AdamW then skips them, because their gradients have been taken."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for table in group["params"] if group.get("rowwise") else ():
                    if table.grad is not None:
                        self._update(table, group)
                        table.grad = None
        super().step()
        return loss

    def _update(self, table: Tensor, group: dict[str, Any]) -> None:
        assert table.grad is not None
        rows, gradient = _touched(table.grad)  # (R,), (R, d)
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one of every parameter it loads
            state["row_sum"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
        state["step"] += 1
        total = state["row_sum"]  # (V,)
        total.index_add_(0, rows, gradient.float().square().mean(dim=1))
        rate = group["lr"] / (total[rows].sqrt() + group["eps"])  # (R,)
        change = gradient * rate[:, None].to(gradient)
        if group["weight_decay"]:
            change += table[rows] * (group["lr"] * group["weight_decay"])
        table.index_add_(0, rows, change.to(table), alpha=-1)


def _touched(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows (R,) with a gradient, and their gradients (R, d)."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        return gradient.indices()[0], gradient.values()
    rows = gradient.ne(0).any(dim=1).nonzero().flatten()
    return rows, gradient[rows]
