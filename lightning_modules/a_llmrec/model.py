"""The networks of A-LLMRec: two autoencoders that meet (stage 1), projectors into a language model (stage 2).

Legend: N pairs, d width of the collaborative vectors, t of the text vectors, l latent width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.errors import ModelError
from lightning_modules.stage_module import mix_seeds

_PROJECTORS = 402  # stream of random numbers

Scores = Literal["dot", "mean"]


class AutoEncoder(nn.Module):
    """One linear layer and a sigmoid down to the latent width, one linear layer back.

    Args:
        size: of what is encoded.
        latent_size: l.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: int, latent_size: int) -> None:
        super().__init__()
        if size < 1 or latent_size < 1:
            raise ValueError(f"sizes must be at least 1, got {size} and {latent_size}")
        self.down, self.up = nn.Linear(size, latent_size), nn.Linear(latent_size, size)

    def encode(self, x: Tensor) -> Tensor:
        """(..., l) in 0..1 of ``x`` (..., size)."""
        return torch.sigmoid(self.down(x))

    def decode(self, latent: Tensor) -> Tensor:
        """(..., size) of ``latent`` (..., l)."""
        return self.up(latent)


@dataclass(frozen=True)
class AlignmentLosses:
    """The four parts of stage 1's loss, each summed over the pairs it is defined for; scalars."""

    matching: Tensor  # equation 2: the latent vectors of an item and of its text
    item: Tensor  # equation 3: the item's vector and its reconstruction
    text: Tensor  # equation 4: the text's vector and its reconstruction
    recommendation: Tensor  # equation 5: users tell their item from another by its reconstruction


def alignment_losses(
    items: AutoEncoder,
    texts: AutoEncoder,
    user: Tensor,
    item: Tensor,
    text: Tensor,
    told: Tensor,
    label: Tensor,
    scores: Scores = "dot",
) -> AlignmentLosses:
    """Equations 2 to 5 of A-LLMRec (Kim et al., KDD 2024, arXiv 2404.11343), summed over pairs.

    Squared errors are means over a vector's entries. The target of the text's reconstruction has no gradient:
    a text encoder that is trained could otherwise make it easy. Items without a text have neither of the two
    losses of texts.

    Args:
        items, texts: the two autoencoders.
        user: (N, d) states before the item.
        item: (N, d) the frozen collaborative vectors.
        text: (N, t).
        told: (N,) bool, whether the item has a text.
        label: (N,) 1 where the user's next item is meant, 0 at a sampled one.
        scores: of the recommendation loss, ``dot`` products (the paper) or their ``mean`` over the d entries
            (the authors' code).
    """
    latent = items.encode(item)  # (N, l)
    rebuilt = items.decode(latent)  # (N, d)
    latent_text = texts.encode(text)  # (N, l)
    rebuilt_text = texts.decode(latent_text)  # (N, t)
    logits = pair_scores(user, rebuilt, scores)  # (N,)
    return AlignmentLosses(
        matching=_squares(latent, latent_text)[told].sum(),
        item=_squares(rebuilt, item).sum(),
        text=_squares(rebuilt_text, text.detach())[told].sum(),
        recommendation=F.binary_cross_entropy_with_logits(logits, label, reduction="sum"),
    )


def pair_scores(user: Tensor, item: Tensor, scores: Scores) -> Tensor:
    """(N,) of pairs (N, d)."""
    products = user * item
    return products.sum(-1) if scores == "dot" else products.mean(-1)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """(N,) mean squared differences."""
    return (a - b).square().mean(-1)


class Projector(nn.Module):
    """Two layers from a collaborative or joint vector to the width of a language model's embeddings.

    Users: Linear, LayerNorm, LeakyReLU, Linear; items have GELU instead (section 4.2 and the authors' code).

    Args:
        size: of what is projected.
        width: H.
        activation: ``leaky_relu`` or ``gelu``.
        gain: of the last layer's initial weights. With 1 (Xavier, as in the authors' code) a root mean square
            of some 0.7 comes out; the embeddings of language models have 0.02 to 0.2.
    """

    def __init__(
        self, size: int, width: int, activation: Literal["leaky_relu", "gelu"], gain: float = 1.0
    ) -> None:
        super().__init__()
        self.size = size
        act = nn.LeakyReLU() if activation == "leaky_relu" else nn.GELU()
        first, last = nn.Linear(size, width), nn.Linear(width, width)
        self.layers = nn.Sequential(first, nn.LayerNorm(width), act, last)
        nn.init.xavier_normal_(first.weight)
        nn.init.xavier_normal_(last.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H) of ``x`` (N, size)."""
        projected: Tensor = self.layers(x)
        return projected


def make_projectors(
    seed: int, embeddings: Tensor, user_size: int | None, item_size: int | None, gain: float | None
) -> tuple[Projector | None, Projector | None]:
    """F_U and F_I, drawn from the seed; None where there is no size.

    Args:
        seed: of the run.
        embeddings: (V, H) of the language model.
        user_size, item_size: of what is projected.
        gain: see ``Projector``; None: soft tokens begin about as large as the embeddings.
    """
    if gain is None:
        gain = float(embeddings.detach().float().square().mean().sqrt())
    width = embeddings.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seeds(seed, _PROJECTORS))
        user = None if user_size is None else Projector(user_size, width, "leaky_relu", gain)
        item = None if item_size is None else Projector(item_size, width, "gelu", gain)
    return user, item


def require_moved(now: nn.Module | None, before: nn.Module | None, steps: int) -> None:
    """Sound the alarm when what was trained is as it was made.

    Args:
        now: after so many ``steps``.
        before: made from the same seed; None where nothing is trained.

    Raises:
        ModelError: no weight differs.
    """
    if now is None or before is None:
        return
    start, end = before.state_dict(), now.state_dict()
    if all(torch.equal(value.cpu(), start[name].cpu()) for name, value in end.items()):
        raise ModelError(
            f"a projector has not moved in {steps} steps: look at the learning rate and the loss"
        )
