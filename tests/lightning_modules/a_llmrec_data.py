"""A small world for A-LLMRec's second stage: histories, a catalogue, and trained parts on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch

from datamodules.loading import AttachTargets, EvalDataset, TrainDataset, TrainRows
from datamodules.samplers import RowBatch
from datamodules.types import CATALOG_SCHEMA, TEST, TRAIN, VALID, EvalRows, Histories, ItemWords
from lightning_modules.a_llmrec import Stage1Module, Stage2Module
from lightning_modules.llm import BackboneSpec, SentenceEncoderSpec
from lightning_modules.sasrec import SASRecModule
from tests.lightning_modules.tiny_bert import LONGEST, write_tiny_bert
from tests.lightning_modules.tiny_llm import write_tiny_llm

ITEMS, WIDTH, LATENT = 12, 8, 4
WORDS = ItemWords("film", "films", "watch", "watched")
# Item 3 has no text at all, item 12 no event, item 5 a long title.
TITLES = ["Jaws", "Alien", None, "Heat (1995)", "A long title of many words", "Up", "Ran", "Psycho",
          "Vertigo", "Se7en", "M", "Never seen"]  # fmt: skip
CATALOG = pl.DataFrame(
    {
        "item_id": list("abcdefghijkl"), "title": TITLES, "description": [None] * ITEMS,
        "categories": [None] * ITEMS, "brand": [None] * ITEMS, "price": [None] * ITEMS,
        "images": [None] * ITEMS,
    },
    schema=CATALOG_SCHEMA,
)  # fmt: skip


def histories(newest: int = 4, valid: int = 5, test: int = 6) -> Histories:
    """Three users; the first's newest training event, validation and test items can be chosen."""
    items = np.array([1, 2, 3, newest, valid, test, 4, 2, 7, 8, 9, 10, 11], np.int32)
    codes = [*([TRAIN] * 4), VALID, TEST, TRAIN, TRAIN, VALID, TEST, TRAIN, VALID, TEST]
    split = np.array(codes, np.int8)
    return Histories(np.array([0, 0, 6, 10, 13]), items, split, np.arange(13), ITEMS)


def held_out(held: Histories, code: int, candidates: int = 4) -> EvalRows:
    """The rows of a split, among the next items."""
    position = np.flatnonzero(held.split == code)
    target = held.items[position].astype(np.int64)
    listed = (target[:, None] + np.arange(candidates) - 1) % ITEMS + 1
    groups = np.ones((len(target), 1), dtype=bool)
    return EvalRows(
        held.users[position].astype(np.int64), position, target, groups, ("all",),
        np.ones(len(target)), listed[:, ::-1].astype(np.int32),
    )  # fmt: skip


class World:
    """What a trainer's data module would say."""

    seed = 0

    def __init__(self, module: Any, held: Histories) -> None:
        self.module, self.histories = module, held
        self.train = TrainDataset(
            TrainRows(held, module.max_length, False, True, True), 0, module.num_candidates
        )
        self.rows = {"val": held_out(held, VALID), "test": held_out(held, TEST)}

    def every_row(self, split: str) -> Any:
        """As ``SequenceDataModule.every_row``."""
        if split == "train":
            return self.train.every()
        return EvalDataset(self.histories, self.rows[split], 0).every()

    def batch(self, split: str, normaliser: float = 1.0, filler: tuple[int, ...] = ()) -> Any:
        """All rows of a split as one batch."""
        if split == "train":
            every = np.arange(len(self.train.rows.user))
            rows = RowBatch(every, np.isin(every, filler), normaliser)
            return self.module.collator(training=True)(self.train[rows])
        attach = AttachTargets(self.module.collator(training=False), self.rows[split], True)
        return attach(self.every_row(split))


class Parts:
    """Trained parts in a folder."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(1)
        self.folder = folder
        self.llm = str(write_tiny_llm(folder / "llm", longest=512))
        self.encoder = SentenceEncoderSpec(
            str(write_tiny_bert(folder / "bert")), max_length=LONGEST
        )
        self.weights = folder / "backbone.ckpt"
        torch.save({"state_dict": self.sasrec().state_dict()}, self.weights)
        self.aligned = folder / "alignment.ckpt"
        stage1 = self.alignment(weights=False)
        attach(stage1, SimpleNamespace(seed=5, histories=histories()))
        state = {n: p for n, p in stage1.state_dict().items() if n.split(".")[0] != "backbone"}
        torch.save({"state_dict": state}, self.aligned)

    def sasrec(self) -> SASRecModule:
        """A backbone."""
        return SASRecModule(num_items=ITEMS, hidden_size=WIDTH, max_length=5)

    def alignment(self, weights: bool = True) -> Stage1Module:
        """The first stage on it."""
        made = Stage1Module(
            CATALOG, self.sasrec(), str(self.weights), self.encoder, latent_size=LATENT
        )
        if weights:
            made.load_weights(self.aligned)
        return made

    def stage2(self, held: Histories | None = None, **options: Any) -> tuple[Stage2Module, World]:
        """The second stage, loaded, and its data."""
        settings: dict[str, Any] = {"num_candidates": 4, **options}
        if "alignment" not in settings and "backbone" not in settings:
            settings["alignment"] = self.alignment()
        llm = BackboneSpec(
            self.llm, dtype="float32", chat_template=settings.pop("chat_template", True),
            max_length=settings.pop("llm_length", 512),
        )  # fmt: skip
        module = settings.pop("kind", Stage2Module)(
            catalog=CATALOG, item_words=WORDS, llm=llm, **settings
        )
        world = World(module, held or histories())
        attach(module, world)
        return module, world


def attach(module: Any, data: Any) -> None:
    """As a trainer of one CPU would."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(
        strategy=strategy, datamodule=data, precision_plugin=None, global_step=1,
        estimated_stepping_batches=30,
    )  # fmt: skip
    module.log = lambda *_, **__: None
    module.configure_model()
