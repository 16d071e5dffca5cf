"""The names that other packages may import from ``datamodules``: columns, histories, batches.

Legend: U users, I items, N interactions, R evaluation rows, B batch rows, T history length,
C candidates, G groups. Internal user and item ids start at 1; 0 is padding everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import polars as pl

if TYPE_CHECKING:
    import torch
    from PIL import Image

# What an event is for. A history always holds every earlier event of its user, whatever the code.
TRAIN, VALID, TEST, CONTEXT = 0, 1, 2, 3
SPLIT_NAMES = {TRAIN: "train", VALID: "valid", TEST: "test", CONTEXT: "context"}

# One row an event, in the raw file's order. A release without ratings or times has null columns.
INTERACTION_SCHEMA: dict[str, pl.DataType] = {
    "user_id": pl.String(),
    "item_id": pl.String(),
    "rating": pl.Float32(),
    "timestamp": pl.Int64(),  # seconds
}
# One row an item. Text that a release does not have is null, never invented.
CATALOG_SCHEMA: dict[str, pl.DataType] = {
    "item_id": pl.String(),
    "title": pl.String(),
    "description": pl.String(),
    "categories": pl.List(pl.String()),
    "brand": pl.String(),
    "price": pl.Float32(),
    "images": pl.List(pl.String()),  # addresses, the best first; empty or null = none is known
}
# What a method shows for an item whose title is null. Counted in the data report, never dressed up.
NO_TITLE = "(no title)"


@dataclass(frozen=True)
class ItemWords:
    """What the items of a data set are called, for methods that write of them.

    Args:
        singular: one item: film, book, product.
        plural: several of them.
        present: what people do with them: watch, read, buy.
        past: what they did: watched, read, bought.

    Raises:
        ValueError: a word is blank.
    """

    singular: str
    plural: str
    present: str
    past: str

    def __post_init__(self) -> None:
        if blank := [f.name for f in fields(self) if not getattr(self, f.name).strip()]:
            raise ValueError(
                f"words for items lack {', '.join(blank)}: film, films, watch, watched"
            )


@dataclass(frozen=True)
class Interactions:
    """Events in the raw file's order, columns as in ``INTERACTION_SCHEMA`` (raw ids).

    Large releases hold the ids as ``pl.Categorical`` instead of strings. ``ordered`` is False where the
    file has neither times nor an order that means anything; histories are then shuffled by a seed.
    """

    frame: pl.DataFrame
    ordered: bool = True


@dataclass(frozen=True)
class Catalog:
    """Items with whatever text the release has, columns as in ``CATALOG_SCHEMA`` (raw ids)."""

    frame: pl.DataFrame


@dataclass(frozen=True)
class RawData:
    """What a parser makes of one release.

    ``skipped`` counts rows left out, by reason; ``checksums`` maps raw file names to SHA-256.
    ``users`` holds a ``user_id`` column and whatever attributes the release has.
    """

    interactions: Interactions
    catalog: Catalog
    users: pl.DataFrame | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Histories:
    """Every user's events in time order, as CSR arrays over internal ids.

    User ``u``'s events are ``items[offsets[u]:offsets[u + 1]]``; user 0 is padding and has none.
    """

    offsets: np.ndarray  # (U + 2,) int64
    items: np.ndarray  # (N,) int32
    split: np.ndarray  # (N,) int8, TRAIN | VALID | TEST | CONTEXT
    timestamps: np.ndarray  # (N,) int64; zeros where the release has none
    num_items: int
    ratings: np.ndarray | None = None  # (N,) float32, NaN where there is none
    kept: bool = True  # False: of one question; what is made of its rows is kept for no other

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 2

    @property
    def users(self) -> np.ndarray:
        """(N,) int32: the user of each event."""
        return np.repeat(np.arange(self.num_users + 1, dtype=np.int32), np.diff(self.offsets))

    def train_counts(self) -> np.ndarray:
        """(I + 1,) int64: training events of each item."""
        return np.bincount(self.items[self.split == TRAIN], minlength=self.num_items + 1)

    def user_train_counts(self) -> np.ndarray:
        """(U + 1,) int64: training events of each user."""
        return np.bincount(self.users[self.split == TRAIN], minlength=self.num_users + 1)


@dataclass(frozen=True)
class EvalRows:
    """One row a held-out event. Its history is every earlier event of the same user."""

    user: np.ndarray  # (R,) int64
    position: np.ndarray  # (R,) int64: index of the target in ``Histories.items``
    target: np.ndarray  # (R,) int64
    groups: np.ndarray  # (R, G) bool
    group_names: tuple[str, ...]  # G names; the first is "all"
    weight: np.ndarray  # (R,) float64: 1 / rows of the same user, so that users weigh the same
    # (R, C) int32, the target among them; None = whole catalogue
    candidates: np.ndarray | None = None
    label: np.ndarray | None = None  # (R,) bool, liked or not; None = every target is positive
    # (R,) int64: first event of the history; None = the user's first
    start: np.ndarray | None = None
    # (R, E) int32, 0 = none: more items that must not be ranked
    unwanted: np.ndarray | None = None


@dataclass
class Batch:
    """Tensors of B rows. A training batch has ``targets`` (B, T); an evaluation batch ``target`` (B,)."""

    row: torch.Tensor  # (B,) index of the row in its split: names the row in files and in DDP
    user: torch.Tensor  # (B,)
    history: torch.Tensor  # (B, T) item ids, oldest first, padded on the right with 0
    length: torch.Tensor  # (B,) real items in ``history``
    targets: torch.Tensor | None = None  # (B, T) next item at each position, 0 = no loss there
    negatives: torch.Tensor | None = None  # (B, T, K) or (K,) sampled items
    normaliser: torch.Tensor | None = None  # () divide the summed loss by this: see samplers.py
    target: torch.Tensor | None = None  # (B,) held-out item
    candidates: torch.Tensor | None = None  # (B, C) the target among them; None = whole catalogue
    seen: torch.Tensor | None = None  # (S, 2) pairs (batch row, item id) that must not be ranked
    groups: torch.Tensor | None = None  # (B, G) bool
    weight: torch.Tensor | None = None  # (B,) float64
    # (B, T) bool: rating above the threshold, where rows are labelled
    liked: torch.Tensor | None = None
    # (B,) bool: whether ``target`` was liked, where rows are labelled
    label: torch.Tensor | None = None
    time: torch.Tensor | None = None  # (B,) seconds: when the newest history event was
    times: torch.Tensor | None = None  # (B, T) seconds of the history's events, where a method asks
    tokens: torch.Tensor | None = None  # (B, L) of each row's prompt, padded on the left
    token_mask: torch.Tensor | None = None  # (B, L) 1 at tokens, 0 at padding
    answers: torch.Tensor | None = None  # (B, A) next token at the last A positions, -100 = no loss
    # (B, L) whose vector stands at each token's place: 0 = the token's own, -1 = the user's, else the item's
    slots: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device (Lightning calls this)."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None
        }
        return replace(self, **moved)

    def part(self, start: int, stop: int, width: int) -> Batch:
        """The histories of rows start..stop-1, cut to ``width`` positions, without what is asked."""
        rows, cells = slice(start, stop), (slice(start, stop), slice(width))
        return Batch(
            row=self.row[rows],
            user=self.user[rows],
            history=self.history[cells],
            length=self.length[rows],
            liked=None if self.liked is None else self.liked[cells],
            time=None if self.time is None else self.time[rows],
            times=None if self.times is None else self.times[cells],
        )

    def __len__(self) -> int:
        return int(self.user.shape[0])


@dataclass(frozen=True)
class Rows:
    """What a loader hands to a method's collator: which rows, and where their events are."""

    histories: Histories
    row: np.ndarray  # (B,) row index in the split
    user: np.ndarray  # (B,)
    start: np.ndarray  # (B,) first event of the user in ``histories.items``
    stop: (
        np.ndarray
    )  # (B,) training: one past the last event to learn from; evaluation: the target's index
    epoch: int
    seed: int
    # (B,) bool: rows that only keep ranks in step and carry no loss
    filler: np.ndarray | None = None
    normaliser: float = 1.0
    # (B,) labelled rows: the item asked about, not always an event
    target: np.ndarray | None = None
    label: np.ndarray | None = None  # (B,) bool: whether it was liked
    liked_above: float | None = None  # events rated above this count as liked
    candidates: np.ndarray | None = None  # (B, C) items to choose from, the target among them


Collator = Callable[[Rows], Batch]


@dataclass(frozen=True)
class InstructionRows:
    """Rows of a table of instructions, by number."""

    texts: pl.DataFrame  # (R,) columns instruction, input, output: all rows of the file
    row: np.ndarray  # (B,) which of them
    filler: np.ndarray | None = None  # (B,) bool: as in ``Rows``
    normaliser: float = 1.0


@dataclass
class TokenBatch:
    """Instructions and their answers as tokens; packed (``llm.packing``), B are sequences of several rows."""

    tokens: torch.Tensor  # (B, L) padded on the left
    token_mask: torch.Tensor  # (B, L) 1 at tokens, 0 at padding
    answers: torch.Tensor  # (B, A) next token at the last A positions, -100 = no loss
    normaliser: torch.Tensor  # () divide the summed loss by this: see samplers.py
    # packed: (B, L) 0, 1, ... in each row, and in the padding
    positions: torch.Tensor | None = None
    columns: torch.Tensor | None = None  # packed: (A,) positions that ``answers`` belongs to

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """The same batch on another device (Lightning calls this)."""
        held = (getattr(self, f.name) for f in fields(self))
        moved = (None if t is None else t.to(device, non_blocking=non_blocking) for t in held)
        return TokenBatch(*moved)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


class ItemImages(Protocol):
    """The items' pictures by internal id; an item without one stays without, nothing stands in for it."""

    @property
    def mask(self) -> np.ndarray:
        """(I + 1,) bool: which items have a picture."""
        ...

    def picture(self, item: int) -> Image.Image:
        """RGB, upright, on white. Raises ValueError: the item has none."""
        ...

    def size(self, item: int) -> tuple[int, int]:
        """Width and height of the picture in pixels, as its file says. Raises ValueError: it has none."""
        ...

    def digest(self, item: int) -> str:
        """SHA-256 (hex) of the picture's bytes as they were sent; "" where there is none."""
        ...


class Method(Protocol):
    """What a data module asks of the module it feeds."""

    # Newest events of a history that the method reads.
    max_length: int
    # Train on every stretch of ``max_length`` targets of a history, instead of the newest one alone.
    all_windows: bool
    # Reads a history in training, so that a user's first event is never a target.
    sequential: bool
    # Sampled items a position of a training batch; 0: the loss needs none.
    num_negatives: int
    # Learn from examples that were liked or not, instead of from the next item of a history.
    labelled: bool
    # Learn from each row's newest training event alone.
    newest_target: bool
    # Items that a newest target is chosen among in training: the rows then come with ``candidates``.
    num_candidates: int
    # Rows of TRAIN and of VALID that a fit uses, at most, drawn by the seed.
    most_rows: dict[int, int]

    def collator(self, training: bool) -> Collator:
        """Turns rows into a batch (runs in loader workers)."""
        ...

    def row_lengths(self, rows: Rows) -> np.ndarray:
        """(R,) what each of all rows of a split costs, in whatever the method pads (events, tokens)."""
        ...


class InstructionMethod(Protocol):
    """What a data module of instructions asks of the module it feeds."""

    def collator(self, training: bool) -> Callable[[InstructionRows], TokenBatch]:
        """Turns rows into a batch (runs in loader workers)."""
        ...

    def row_lengths(self, rows: InstructionRows) -> np.ndarray:
        """(R,) tokens of each row."""
        ...

    def target_counts(self, rows: InstructionRows) -> np.ndarray:
        """(R,) tokens of each row that carry a loss; 0 leaves a row out."""
        ...
