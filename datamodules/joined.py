"""Several data sets as one, for methods that read text: trained on one domain and tested on another, or both.

TALLRec (arXiv 2305.00447) tunes on films and is asked about books, and learns from K examples of each;
A-LLMRec (arXiv 2404.11343) is moved from films to games. Ids of the parts never meet: users and items are
numbered one part after the other, and raw ids have the part's name before them.

Legend: U users, I items, N events, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.base import SequenceDataModule
from datamodules.errors import each_or_all_errors
from datamodules.groups import GROUP_NAMES
from datamodules.item_images import JoinedImages
from datamodules.prepared import ROW_COLUMNS, Prepared, store
from datamodules.row_samples import RowSample
from datamodules.types import (
    CONTEXT,
    SPLIT_NAMES,
    TEST,
    TRAIN,
    VALID,
    Histories,
    ItemImages,
    ItemWords,
    RawData,
)
from datamodules.versioning import package_digest, publish_folder, value_digest


class JoinedDataModule(SequenceDataModule):
    """Parts that are trained on, selected on and tested on, each prepared by its own recipe.

    Args:
        parts: data modules by the name that their raw ids begin with.
        train: names of the parts that are learned from.
        valid: names of those that select the best epoch; None = those of ``train``.
        test: names of those that are tested; None = those of ``train``. Of several, each is also a group.
        words: what the items of all parts are called alike: a prompt is not worded by its domain.
        test_rows: as in ``SequenceDataModule``.
        allow_mismatch: whether a paper's preset may run on parts of other counts than expected.
        cache: as in ``SequenceDataModule``.

    Raises:
        ValueError: an unknown name, or one of a group; on preparing, parts that rank the whole catalogue (two
            domains have none in common) or whose rows differ in kind.
    """

    def __init__(
        self,
        parts: Mapping[str, SequenceDataModule],
        train: Sequence[str],
        valid: Sequence[str] | None = None,
        test: Sequence[str] | None = None,
        words: ItemWords | None = None,
        test_rows: RowSample | None = None,
        allow_mismatch: bool = False,
        cache: str | None = None,
    ) -> None:
        super().__init__(
            "+".join(parts),
            words=words,
            test_rows=test_rows,
            allow_mismatch=allow_mismatch,
            cache=cache,
        )
        self.parts = dict(parts)
        self.uses = {
            TRAIN: tuple(train),
            VALID: tuple(train if valid is None else valid),
            TEST: tuple(train if test is None else test),
        }
        if taken := set(parts) & {*ROW_COLUMNS, *GROUP_NAMES}:
            raise ValueError(f"a part cannot be called {', '.join(sorted(taken))}: rows have that.")
        unknown = sorted({name for names in self.uses.values() for name in names} - set(parts))
        if unknown or not all(self.uses.values()):
            told = (
                f"no part is called {', '.join(unknown)}" if unknown else "a list of parts is empty"
            )
            raise ValueError(f"JoinedDataModule has the parts {', '.join(parts)}, but {told}.")

    def load_raw(self) -> RawData:
        """Nothing of its own.

        Raises:
            TypeError: always; the parts load themselves.
        """
        raise TypeError("JoinedDataModule has no rows of its own; its parts are loaded one by one")

    def asked(self) -> dict[str, Any]:
        """The parts' content and what each is for. Raises DataSourceError for all that are missing."""
        uses = {SPLIT_NAMES[code]: list(names) for code, names in self.uses.items()}
        parts = each_or_all_errors(partial(getattr, p, "prepared") for p in self.parts.values())
        digests = {n: made.digest for n, made in zip(self.parts, parts, strict=True)}
        return {"parts": digests, "uses": uses}

    @property
    def tells_likes(self) -> bool:
        """Whether any part does."""
        return any(part.tells_likes for part in self.parts.values())

    @property
    def liked_above(self) -> float | None:
        """Ratings are stored as 1, liked, and 0: each part has its own threshold."""
        return 0.5

    @cached_property
    def item_images(self) -> ItemImages:
        """Those of the parts."""
        return JoinedImages([part.item_images for part in self.parts.values()])

    @cached_property
    def prepared(self) -> Prepared:
        """The joined folder, made on first use."""
        key = value_digest({"asked": self.asked(), "code": package_digest()})
        folder = self.cache / "prepared" / f"{self.recipe.name}-{key}"
        if not (folder / "manifest.json").is_file():
            publish_folder(folder, "manifest.json", self._write)
        return Prepared(folder)

    def _write(self, folder: Path) -> None:
        tables = {
            SPLIT_NAMES[code]: table
            for code in (TRAIN, VALID, TEST)
            if (table := self._rows_of(code)) is not None
        }
        items = self._attributes("items", "item_id")
        users = self._attributes("users", "user_id")
        histories = self._joined_histories(items.height)
        counts = {
            "users": users.height,
            "items": items.height,
            "interactions": len(histories.items),
        }
        made = {n: p.prepared for n, p in self.parts.items()}
        recipes = {name: part.protocol for name, part in made.items()}
        manifest = {
            "recipe": {"name": self.recipe.name, "uses": self.asked()["uses"], **recipes},
            "asked": self.asked(),
            "source": "; ".join(f"{n}: {p.manifest['source']}" for n, p in made.items()),
            "checksums": {
                f"{n}: {f}": c for n, p in made.items() for f, c in p.manifest["checksums"].items()
            },
            "counts": counts,
            "parts": {name: str(part.folder) for name, part in made.items()},
        }
        store(folder, histories, items, users, tables, manifest)

    def _joined_histories(self, num_items: int) -> Histories:
        found = [part.histories for part in self.parts.values()]
        counts = np.concatenate([np.diff(h.offsets)[1:] for h in found])  # (U,)
        shifts = self._shifts("items")
        return Histories(
            offsets=np.concatenate([[0, 0], np.cumsum(counts)]).astype(np.int64),  # (U + 2,)
            items=np.concatenate([h.items + s for h, s in zip(found, shifts, strict=True)]),
            split=np.concatenate([self._codes(name) for name in self.parts]),
            timestamps=np.concatenate([h.timestamps for h in found]),
            num_items=num_items,
            ratings=np.concatenate([_likes(part) for part in self.parts.values()]),
        )

    def _codes(self, name: str) -> np.ndarray:
        """(N,) int8: a part's codes, context where the part is not used for that."""
        codes = self.parts[name].histories.split
        used = [code for code, names in self.uses.items() if name in names]
        return np.where(np.isin(codes, used), codes, CONTEXT).astype(np.int8)

    def _shifts(self, what: str) -> list[int]:
        """What is added to each part's internal ids (or places of events)."""
        sizes = [p.prepared.manifest["counts"][what] for p in self.parts.values()]
        return [0, *np.cumsum(sizes)[:-1].tolist()]

    def _attributes(self, what: str, key: str) -> pl.DataFrame:
        """Items or users of every part in turn, and the part's name as their ``domain``."""
        frames = [
            getattr(part.prepared, what).with_columns(
                pl.format("{}:{}", pl.lit(name), key).alias(key), pl.lit(name).alias("domain")
            )
            for name, part in self.parts.items()
        ]
        return pl.concat(frames, how="diagonal_relaxed")

    def _rows_of(self, code: int) -> pl.DataFrame | None:
        """The rows of every part that is used for this, renumbered."""
        shifts = {w: self._shifts(w) for w in ("users", "items", "interactions")}
        found = []
        for number, (name, part) in enumerate(self.parts.items()):
            table = part.prepared.table(code)
            if name not in self.uses[code] or table is None:
                continue
            user, item, event = (shifts[w][number] for w in ("users", "items", "interactions"))
            found.append(_shifted(table, user, item, event))
        if code == TRAIN and not found:
            return None
        _check_alike(found, SPLIT_NAMES[code])
        if code != TRAIN and len(found) > 1:  # each part is a group of its own
            used = [name for name in self.parts if name in self.uses[code]]
            found = [
                table.with_columns(pl.lit(name == part).alias(name) for name in used)
                for part, table in zip(used, found, strict=True)
            ]
        return pl.concat(found)


def _likes(part: SequenceDataModule) -> np.ndarray:
    """(N,) float32: 1 where an event was liked."""
    histories = part.histories
    if part.liked_above is None or histories.ratings is None:
        return np.ones(len(histories.items), np.float32)
    return (histories.ratings > part.liked_above).astype(np.float32)


def _shifted(table: pl.DataFrame, user: int, item: int, event: int) -> pl.DataFrame:
    """Rows with their part's numbers raised; 0 stays padding."""
    moved = {"user": user, "target": item, "position": event, "start": event}
    table = table.with_columns(pl.col(n) + by for n, by in moved.items() if n in table.columns)
    if "candidates" not in table.columns:
        return table
    drawn = table["candidates"].to_numpy()  # (R, C)
    raised = np.where(drawn > 0, drawn + item, 0).astype(np.int32)
    return table.with_columns(pl.Series("candidates", raised))


def _check_alike(tables: list[pl.DataFrame], split: str) -> None:
    """Rows of one kind. Raises ValueError."""
    for table in tables:
        if table.schema != tables[0].schema:
            raise ValueError(
                f"the parts' {split} rows differ ({dict(tables[0].schema)} and {dict(table.schema)}); give "
                "each part the same groups, as many candidates, and labelled examples or none."
            )
        if not {"label", "candidates"} & set(table.columns):
            raise ValueError(
                f"the parts' {split} targets are ranked in the whole catalogue, which two domains do not "
                f"share; give each part candidates or labelled examples (columns {ROW_COLUMNS})."
            )
