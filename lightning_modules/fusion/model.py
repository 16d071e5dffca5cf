"""How two models' scores become one: a temperature each, and a weight for each bin of training counts.

Legend: R rows, C candidates, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

EDGES = (0, 1, 5, 10, 20, 50, 100, 200)  # the least training events of each bin
_WIDEST = 7.0  # log of the sharpest and of the flattest temperature, over the scores' own spread


def bins_of(counts: NDArray[Any], edges: Sequence[int] = EDGES) -> Ints:
    """The bin of each count, in the counts' shape: the last edge that is not above it.

    Raises:
        ValueError: the edges do not begin with 0, or do not ascend.
    """
    if not edges or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges must ascend from 0, for instance {list(EDGES)}, got {list(edges)}")
    return np.searchsorted(np.asarray(edges), counts, side="right") - 1


def bin_names(edges: Sequence[int] = EDGES) -> list[str]:
    """``0``, ``1-4``, ..., ``200+``."""
    told = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(edges)]
    return [*told, f"{edges[-1]}+"]


def log_softmax(scores: Floats, real: Bools) -> Floats:
    """(R, C) over each row's real candidates; 0 at padding."""
    shown = np.where(real, scores, -np.inf)
    shown = shown - shown.max(1, keepdims=True)
    return np.where(real, shown - np.log(np.exp(shown).sum(1, keepdims=True)), 0.0)


def fit_temperature(scores: Floats, real: Bools, target: Ints) -> float:
    """T > 0 that minimises -log softmax(scores / T) of the targets (Guo et al., ICML 2017, section 4.2).

    The loss is convex in 1 / T. Scores without information have a T that makes them uniform.

    Args:
        scores: (R, C), finite where ``real``.
        real: (R, C), False at padding.
        target: (R,) column of each target.
    """
    from scipy.optimize import minimize_scalar  # slow to import

    row = np.arange(len(scores))
    centre = np.where(real, scores, 0).sum(1, keepdims=True) / real.sum(1, keepdims=True)
    spread = float(np.sqrt(np.square(scores - centre)[real].mean())) or 1.0

    def loss(log_scale: float) -> float:
        return -float(log_softmax(scores * (np.exp(log_scale) / spread), real)[row, target].mean())

    found = minimize_scalar(loss, bounds=(-_WIDEST, _WIDEST), method="bounded")
    return float(spread * np.exp(-found.x))


@dataclass(frozen=True)
class Gate:
    """sharpness * ((1 - w) first + w second) + offset, w and offset by the candidate's own bin.

    First and second are log-probabilities. Without offsets a weight would also have to say how likely targets
    of its bin are, which is not what it is meant to tell.
    """

    sharpness: float
    weights: Floats  # (B,) in [0, 1]: how much the second model counts
    offsets: (
        Floats  # (B,) of sum 0: what neither model knows of how often a bin's items are targets
    )

    def __call__(self, first: Floats, second: Floats, bins: Ints) -> Floats:
        """Fused scores (R, C) of log-probabilities and bins of that shape."""
        weight = self.weights[bins]
        return self.sharpness * ((1 - weight) * first + weight * second) + self.offsets[bins]


def fit_gate(
    first: Floats,
    second: Floats,
    bins: Ints,
    real: Bools,
    target: Ints,
    num_bins: int,
    smoothness: float = 1.0,
    offsets: bool = True,
) -> Gate:
    """The gate that minimises the summed -log softmax of the targets' fused scores.

    With u = sharpness * w the loss is that of a conditional logit model (McFadden, 1974), convex in
    (sharpness, u, offset), and so is what is allowed, 0 <= u <= sharpness: the minimum does not depend on
    where the search starts. ``smoothness`` times the squared differences of u, and of the offsets, between
    neighbouring bins is added. It weighs as much as a few rows do, and says what holds for a bin that no
    validation row has a candidate in.

    Args:
        first, second: (R, C) log-probabilities of two models.
        bins: (R, C) bin of each candidate.
        real: (R, C), False at padding.
        target: (R,) column of each target.
        num_bins: B.
        smoothness: how much neighbouring bins are held together, at least 0.
        offsets: False keeps them 0.
    """
    from scipy.optimize import minimize  # slow to import

    row, gap = np.arange(len(first)), second - first
    flat = bins.ravel()

    def loss(x: Floats) -> tuple[float, Floats]:
        gate = _gate(x, num_bins)
        log_p = log_softmax(gate(first, second, bins), real)
        # What the model expects, less what is there: the gradient in the scores.
        excess = np.where(real, np.exp(log_p), 0.0)  # (R, C)
        excess[row, target] -= 1
        rough_u, slope_u = _roughness(gate.sharpness * gate.weights)
        rough_offset, slope_offset = _roughness(gate.offsets)
        to_u = np.bincount(flat, (excess * gap).ravel(), num_bins) + smoothness * slope_u
        to_offset = np.bincount(flat, excess.ravel(), num_bins) + smoothness * slope_offset
        to_sharpness = float((excess * first).sum() + to_u @ gate.weights)
        value = -float(log_p[row, target].sum()) + smoothness * (rough_u + rough_offset)
        return value, np.concatenate([[to_sharpness], gate.sharpness * to_u, to_offset])

    start = np.concatenate([[1.0], np.full(num_bins, 0.5), np.zeros(num_bins)])
    free = (None, None) if offsets else (0.0, 0.0)
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B",
        bounds=[(1e-3, 1e3), *[(0.0, 1.0)] * num_bins, *[free] * num_bins],
        options={"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-7},
    )  # fmt: skip
    return _gate(found.x, num_bins)


def _gate(x: Floats, num_bins: int) -> Gate:
    return Gate(float(x[0]), x[1 : 1 + num_bins], x[1 + num_bins :] - x[1 + num_bins :].mean())


def _roughness(values: Floats) -> tuple[float, Floats]:
    """The squared differences of neighbours, summed, and the gradient (B,)."""
    step = np.diff(values)
    return float(step @ step), 2 * np.diff(np.concatenate([[0.0], -step, [0.0]]))
