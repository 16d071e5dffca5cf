"""A made-up world for A-LLMRec's benchmark: titles as long as MovieLens', users, and both stages on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from datamodules.loading import AttachNegatives, AttachTargets, EvalDataset, TrainDataset, TrainRows
from datamodules.samplers import RowBatch
from datamodules.types import (
    CATALOG_SCHEMA,
    TEST,
    TRAIN,
    VALID,
    Batch,
    EvalRows,
    Histories,
    ItemWords,
)
from lightning_modules.a_llmrec import Stage1Module, Stage2Module
from lightning_modules.llm import BackboneSpec, SentenceEncoderSpec
from lightning_modules.llm.text_encoder import Trained
from lightning_modules.sasrec import SASRecModule

ITEMS, USERS, CANDIDATES, SHOWN = 1000, 512, 20, 10
CPU = torch.device("cpu")
WORDS = ItemWords("film", "films", "watch", "watched")
# SmolLM2 reads the titles of MovieLens-1M as 11.2 tokens (standard deviation 3.3), these as 11.7 (2.9).
_NOUNS = [
    "Affair", "Angel", "Blood", "Bride", "Candle", "Carnival", "Castle", "City", "Crime", "Dance",
    "Daughter", "Desert", "Dream", "Empire", "Fire", "Garden", "Ghost", "Harbor", "Heart", "Hotel",
    "Island", "King", "Lake", "Legend", "Letter", "Lover", "Masquerade", "Midnight", "Mirror", "Moon",
    "Mountain", "Night", "Ocean", "Orchid", "Paradise", "Prisoner", "Promise", "Queen", "River", "Shadow",
    "Silence", "Stranger", "Summer", "Thief", "Thunder", "Train", "Voyage", "Wedding", "Widow", "Winter",
]  # fmt: skip
_KINDS = [
    "Crimson", "Dangerous", "Eternal", "Forbidden", "Golden", "Hidden", "Last", "Lonely", "Lost", "Savage",
    "Secret", "Silent",
]  # fmt: skip
_PATTERNS = (
    "{a} ({y})", "{k} {a} ({y})", "{a} of the {b}, The ({y})", "{a} and {b} ({y})", "{k} {a}: {b} ({y})",
    "{a} in the {k} {b} ({y})", "My {a}'s {k} {b} ({y})", "{k} {a}, The ({y})",
    "{a} of the {k} {b} (La {b} {k}) ({y})",
)  # fmt: skip


def titles(count: int, seed: int = 0) -> list[str]:
    """(count) made-up film titles, all different."""
    draw = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        a, b = draw.choice(_NOUNS, 2, replace=False)
        text = draw.choice(_PATTERNS).format(
            a=a, b=b, k=draw.choice(_KINDS), y=draw.integers(1930, 2000)
        )
        found[text] = None
    return list(found)


def catalogue(words: int, seed: int = 1) -> pl.DataFrame:
    """``ITEMS`` items, each with a title and a description of so many words."""
    draw = np.random.default_rng(seed)
    pool = [word.lower() for word in (*_NOUNS, *_KINDS)]
    told = [" ".join(draw.choice(pool, words)) for _ in range(ITEMS)]
    empty = [None] * ITEMS
    return pl.DataFrame(
        {
            "item_id": [str(i) for i in range(1, ITEMS + 1)], "title": titles(ITEMS), "description": told,
            "categories": empty, "brand": empty, "price": empty, "images": empty,
        },
        schema=CATALOG_SCHEMA,
    )  # fmt: skip


def histories(shown: int = SHOWN, seed: int = 2) -> Histories:
    """``USERS`` users: each prompt, of training, validation and test, shows ``shown`` items or more."""
    draw = np.random.default_rng(seed)
    size = shown + 3
    items = np.concatenate([draw.permutation(ITEMS)[:size] + 1 for _ in range(USERS)])
    split = np.tile([*([TRAIN] * (shown + 1)), VALID, TEST], USERS).astype(np.int8)
    offsets = np.concatenate([[0], np.arange(USERS + 1) * size])
    return Histories(offsets, items.astype(np.int32), split, np.arange(len(items)), ITEMS)


class World:
    """What a trainer's data module would say."""

    seed = 0

    def __init__(self, module: Any, held: Histories) -> None:
        self.module, self.histories = module, held
        candidates = module.num_candidates
        rows = TrainRows(held, module.max_length, False, newest_target=True)
        self.train = TrainDataset(rows, 0, candidates)
        position = np.flatnonzero(held.split == TEST)
        target = held.items[position].astype(np.int64)
        shift = np.random.default_rng(3).permutation(ITEMS - 1)[: max(1, candidates) - 1] + 1
        others = (target[:, None] - 1 + shift) % ITEMS + 1
        listed = np.random.default_rng(4).permuted(np.column_stack([target, others]), axis=1)
        self.rows = EvalRows(
            held.users[position].astype(np.int64), position, target, np.ones((len(target), 1), bool),
            ("all",), np.ones(len(target)), listed.astype(np.int32),
        )  # fmt: skip

    def every_row(self, split: str) -> Any:
        """As ``SequenceDataModule.every_row``."""
        data = self.train if split == "train" else EvalDataset(self.histories, self.rows, 0)
        return data.every()

    def batch(self, split: str, rows: np.ndarray, normaliser: int | None = None) -> Batch:
        """Rows of ``train`` or ``test``; a loss is divided by ``normaliser``, or by the number of rows."""
        if split == "train":
            count = float(normaliser or len(rows))
            chosen = RowBatch(rows, np.zeros(len(rows), bool), count)
            collate = self.module.collator(training=True)
            if self.module.num_negatives:
                collate = AttachNegatives(collate, self.module.num_negatives)
            return collate(self.train[chosen])
        attach = AttachTargets(self.module.collator(training=False), self.rows, True)
        none = np.zeros(len(rows), bool)
        return attach(EvalDataset(self.histories, self.rows, 0)[RowBatch(rows, none, 1.0)])


class Parts:
    """Both stages with random weights: what they cost does not depend on what they have learned."""

    def __init__(
        self, folder: Path, llm: BackboneSpec, encoder: SentenceEncoderSpec, words: int = 60
    ) -> None:
        self.llm, self.encoder, self.catalog = llm, encoder, catalogue(words)
        self.folder = folder
        torch.manual_seed(0)
        torch.save({"state_dict": self._sasrec().state_dict()}, folder / "backbone.ckpt")
        stage1, _ = self.stage1("none")
        state = {n: p for n, p in stage1.state_dict().items() if n.split(".")[0] != "backbone"}
        torch.save({"state_dict": state}, folder / "alignment.ckpt")

    def _sasrec(self) -> SASRecModule:
        return SASRecModule(num_items=ITEMS, hidden_size=50, max_length=50)

    def _alignment(self, trained: Trained) -> Stage1Module:
        return Stage1Module(
            self.catalog, self._sasrec(), str(self.folder / "backbone.ckpt"), self.encoder,
            encoder_trained=trained,
        )  # fmt: skip

    def stage1(self, trained: Trained, device: torch.device = CPU) -> tuple[Stage1Module, World]:
        """The first stage, loaded, and its data; see ``Stage1Module`` for what of the encoder is trained."""
        module = self._alignment(trained)
        world = World(module, histories())
        attach(module, world, device)
        return module.to(device), world

    def stage2(
        self, device: torch.device, shown: int = SHOWN, candidates: int = CANDIDATES, **options: Any
    ) -> tuple[Stage2Module, World]:
        """The second stage, loaded, and its data."""
        alignment = self._alignment("none")
        alignment.load_weights(self.folder / "alignment.ckpt")
        module = Stage2Module(
            self.catalog, WORDS, self.llm, alignment=alignment, max_length=shown,
            num_candidates=candidates, **options,
        )  # fmt: skip
        world = World(module, histories(shown))
        attach(module, world, device)
        return module.to(device), world


def attach(module: Any, data: Any, device: torch.device) -> None:
    """As a trainer of one device would."""
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=device), datamodule=data, precision_plugin=None,
        global_step=1, estimated_stepping_batches=30,
    )  # fmt: skip
    module.log = lambda *_, **__: None
    module.configure_model()


def gradients(module: Any) -> dict[str, Tensor]:
    """What is trained, by name."""
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
