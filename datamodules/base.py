"""``SequenceDataModule``: prepare once, then hand each method the rows it asked for.

Legend: U users, N interactions, R rows, B batch rows, T history length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars
from torch.utils.data import DataLoader

from datamodules.candidates import Candidates, FullRanking
from datamodules.examples import Examples, ExampleTable
from datamodules.filters import Filter
from datamodules.groups import QuantileGroups
from datamodules.image_ids import read_ids
from datamodules.images import ImageStore, open_images
from datamodules.item_images import CatalogueImages
from datamodules.loading import (
    AttachLabels,
    AttachNegatives,
    AttachTargets,
    EvalDataset,
    ExampleDataset,
    TrainDataset,
    TrainRows,
)
from datamodules.orders import Order
from datamodules.prepare import prepare
from datamodules.prepared import Prepared
from datamodules.recipe import Groups, Recipe
from datamodules.row_histories import row_histories
from datamodules.row_samples import RowSample, some_of, take_rows
from datamodules.samplers import RowBatch
from datamodules.splits import LeaveOneOut, Split
from datamodules.stage_data import StageDataModule
from datamodules.types import (
    NO_TITLE,
    TEST,
    TRAIN,
    VALID,
    Batch,
    Collator,
    EvalRows,
    Histories,
    ItemImages,
    ItemWords,
    Method,
    RawData,
    Rows,
)
from datamodules.versioning import place_stats

if TYPE_CHECKING:
    from datamodules.corrupted import Corruption


class SequenceDataModule(StageDataModule):
    """Users' histories, splits and candidates of one data set, shared by every method.

    Every data set takes these arguments besides its own.

    Args:
        name: names the data set in folders and tables.
        root: a folder with the raw files; None uses the cache, then the official source.
        filters: applied to the raw rows in this order.
        split: what each event is for.
        candidates: what each target is ranked among.
        groups: which rows count as cold and warm.
        examples: labelled examples for yes/no methods; None ranks every target.
        images: a folder or tar of item images named by item id; None uses what ``make images`` downloaded.
        image_ids: ``id`` (the data's own), ``title``, or a file: see ``image_ids.read_ids``.
        words: what items are called, for methods that write of them.
        test_rows: test some of the rows alone (of ``test_code``), all methods the same ones; None tests all.
        mask_seen: leave the items of a row's own history out of its ranking.
        order: another order of each history than time (``orders``).
        order_seed: shuffles the histories of a release without times and without an order.
        on_bad_row: ``error`` stops at the first bad row; ``skip`` leaves it out and counts it.
        expected: users, items, interactions after filtering, as published; the data report shows the
            difference, and a ``preset: paper`` experiment refuses it.
        allow_mismatch: let a ``preset: paper`` experiment run on data of other counts than expected.
        cache: where prepared data is kept (default: ``LLMREC_CACHE`` or the user's cache folder).
    """

    def __init__(
        self,
        name: str,
        /,
        *,
        root: str | None = None,
        filters: Sequence[Filter] = (),
        split: Split | None = None,
        candidates: Candidates | None = None,
        groups: Groups | None = None,
        examples: Examples | None = None,
        images: str | None = None,
        image_ids: str = "id",
        words: ItemWords | None = None,
        test_rows: RowSample | None = None,
        mask_seen: bool = True,
        order_seed: int = 0,
        order: Order | None = None,
        on_bad_row: str = "error",
        expected: dict[str, int | None] | None = None,
        allow_mismatch: bool = False,
        cache: str | None = None,
    ) -> None:
        super().__init__(name, cache)
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}, expected 'error' or 'skip'")
        self.root = Path(root).expanduser() if root else None
        self.recipe = Recipe(
            name, tuple(filters), split or LeaveOneOut(), candidates or FullRanking(),
            groups or QuantileGroups(), examples, order_seed, order,
        )  # fmt: skip
        self.image_place = Path(images).expanduser() if images else None
        self.image_ids = image_ids
        self.item_words, self.test_rows = words, test_rows
        self.mask_seen = mask_seen
        self.on_bad_row = on_bad_row
        self.expected = expected or {}
        self.allow_mismatch = allow_mismatch
        self._prepared: Prepared | None = None
        self._rows: dict[int, EvalRows] = {}
        self._asked: Histories | None = None  # whose events are those of the rows held out

    corruption: Corruption | None = None  # wrong texts or pictures, of a probe

    @abstractmethod
    def load_raw(self) -> RawData:
        """Fetch and parse the release."""

    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """Plain values that, with the recipe, name the prepared folder."""

    def local_files(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the user's files: when they change, what is prepared does, too."""
        return place_stats(self.root) if self.root else []

    @property
    def prepared(self) -> Prepared:
        """The prepared folder, made on first use."""
        if self._prepared is None:
            asked = {**self.asked(), "on_bad_row": self.on_bad_row, "files": self.local_files()}
            self._prepared = prepare(self.recipe, self.load_raw, asked, self.cache)
        return self._prepared

    @property
    def histories(self) -> Histories:
        """Every user's events in time order."""
        return self.prepared.histories

    @property
    def num_items(self) -> int:
        """I."""
        return self.histories.num_items

    @property
    def num_users(self) -> int:
        """U."""
        return self.histories.num_users

    @property
    def catalog(self) -> polars.DataFrame:
        """Columns as in ``CATALOG_SCHEMA``; row ``i`` is the internal item ``i + 1``."""
        items = self.prepared.items
        return items if self.corruption is None else self.corruption.catalog(items)

    @property
    def user_facts(self) -> polars.DataFrame:
        """What the release tells of users beside ``user_id``; row ``u`` is the internal user ``u + 1``."""
        return self.prepared.users

    def rows(self, code: int) -> EvalRows:
        """Held-out rows of ``VALID`` or ``TEST``; of those that a test scores the sample, if there is one."""
        if code not in self._rows:
            rows = self.prepared.rows(code)
            sample = self.test_rows if code == self.test_code else None
            self._rows[code] = rows if sample is None else sample(rows)
        return self._rows[code]

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups that metrics are given for; the first is ``all``."""
        return self.rows(TEST).group_names

    def sampled_candidates(self, code: int) -> bool:
        """Whether a split's targets are ranked among sampled candidates, not the whole catalogue."""
        return self.rows(code).candidates is not None

    def labelled(self, code: int) -> bool:
        """Whether a split's rows are examples that were liked or not, instead of targets to rank."""
        return self.rows(code).label is not None

    @property
    def titles(self) -> list[str]:
        """(I + 1,) the title of each internal id; ``NO_TITLE`` where there is none, "" for padding."""
        return ["", *self.prepared.items["title"].fill_null(NO_TITLE)]

    @cached_property
    def images(self) -> ImageStore | None:
        """The items' images by raw id; None where none are given and none were downloaded."""
        place, items = self.image_place, self.prepared.items.select("item_id", "title")
        renamed = read_ids(self.image_ids, place, items) if place else None
        return open_images(place, self.cache, self.recipe.name, renamed)

    @cached_property
    def item_images(self) -> ItemImages:
        """The images by internal id, as modules see them. A method must not make up those that miss."""
        images = CatalogueImages(self.images, self.prepared.items["item_id"].to_list())
        return images if self.corruption is None else self.corruption.images(images)

    def protocol(self) -> dict[str, Any]:
        """Everything about the data that two comparable numbers must share."""
        found = {**self.prepared.tested(self.test_code), "mask_seen": self.mask_seen}
        return found if self.test_rows is None else {**found, "test_rows": repr(self.test_rows)}

    def validation_rows(self) -> int:
        """Held-out rows of ``VALID``."""
        return len(self.rows(VALID).target)

    def remarks(self) -> list[str]:
        """How many items have an image, where any are given."""
        if self.images is None:
            return []
        mask = self.item_images.mask[1:]
        return [f"images: {int(mask.sum()):,} of {len(mask):,} items have one"]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Global batches of training rows, the same on every number of devices; labelled ones by length."""
        method = self._method()
        examples = self.prepared.examples()
        if method.labelled and examples is None:
            raise ValueError(
                f"{type(method).__name__} learns from labelled examples, but {self.recipe.name} has "
                "none: give data.examples a recipe, for instance datamodules.examples.RatedTargets."
            )
        if examples is not None and method.labelled:
            return self._example_loader(examples)
        rows = self._train_rows()
        dataset = TrainDataset(rows, self.seed, method.num_candidates)
        sampler = self._train_batches(method.row_lengths(dataset.every()), rows.target_counts)
        collate = method.collator(training=True)
        if method.num_negatives:
            collate = AttachNegatives(collate, method.num_negatives, method.sequential)
        return self._loader(dataset, sampler, collate)

    def _train_rows(self) -> TrainRows:
        """A method of sequences learns from the same training events, whatever they were rated."""
        method = self._method()
        rows = TrainRows(
            self.histories, method.max_length, method.all_windows, method.sequential,
            method.newest_target,
        )  # fmt: skip
        rows.keep(some_of(len(rows.user), method.most_rows.get(TRAIN), self.seed))
        return rows

    def every_row(self, split: str) -> Rows:
        """All rows of ``train``, ``val`` or ``test``, numbered as in the trainer's batches.

        Those of ``train`` are without the candidates that each epoch draws.
        """
        if split == "train":
            return TrainDataset(self._train_rows(), self.seed).every()
        test = split == "test"
        held_out = self.rows(self.test_code) if test else self._validated()
        histories = (self._asked if test else None) or self.histories
        return EvalDataset(histories, held_out, self.seed, self.liked_above).every()

    def _validated(self) -> EvalRows:
        """The rows that a fit of the trainer's method is validated on."""
        rows, most = self.rows(VALID), self._method().most_rows.get(VALID)
        return take_rows(rows, some_of(len(rows.user), most, self.seed))

    def _example_loader(self, examples: ExampleTable) -> DataLoader[Batch]:
        method = self._method()
        dataset = ExampleDataset(self.histories, examples, self.seed, self.liked_above)
        lengths = method.row_lengths(dataset[RowBatch.every(len(examples))])
        assert self.recipe.examples is not None
        sampler = self._train_batches(
            lengths, np.ones(len(examples), np.int64), True, self.recipe.examples.together
        )
        return self._loader(dataset, sampler, AttachLabels(method.collator(training=True)))

    row_histories = property(row_histories)  # by split, for modules that write of each history

    @property
    def tells_likes(self) -> bool:
        """Whether batches say which events of a history were liked."""
        return self.recipe.examples is not None

    @property
    def liked_above(self) -> float | None:
        """Events rated above it are likes; None where every event is one."""
        return self.recipe.examples.liked_above if self.recipe.examples else None

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation rows, each exactly once over all devices."""
        return self._eval_loader(self._validated(), self.histories)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Rows of ``test_code``, each exactly once over all devices."""
        return self._eval_loader(self.rows(self.test_code), self._asked or self.histories)

    def ask(self, rows: EvalRows, histories: Histories | None = None) -> None:
        """Hold these rows out in place of the data's own: what is tested or predicted next is of them.

        Args:
            rows: with ``start``, where ``histories`` are given.
            histories: whose events the rows are of, where those are not the data's own.
        """
        self._rows[self.test_code], self._asked = rows, histories

    def raw_users(self, users: np.ndarray) -> polars.Series:
        """Raw ids of internal user ids."""
        return self.prepared.users["user_id"].gather(users - 1)

    def raw_items(self, items: np.ndarray) -> polars.Series:
        """Raw ids of internal item ids; no Python string is made of any."""
        return self.prepared.items["item_id"].gather(items - 1)

    def _eval_loader(self, rows: EvalRows, histories: Histories) -> DataLoader[Batch]:
        method = self._method()
        dataset = EvalDataset(histories, rows, self.seed, self.liked_above)
        sampler = self._eval_batches(method.row_lengths(dataset.every()))
        attach: Collator = AttachTargets(method.collator(training=False), rows, self.mask_seen)
        if self.tells_likes:
            attach = AttachLabels(attach)
        return self._loader(dataset, sampler, attach)

    def _method(self) -> Method:
        return cast(Method, self._trainer().lightning_module)
