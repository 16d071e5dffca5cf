"""Pictures of shapes with captions, drawn on the spot: some combinations are held out."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from datamodules.samplers import EvalBatchSampler, GlobalBatchSampler

COLOURS = {
    "red": (220, 30, 30), "green": (30, 170, 40), "blue": (30, 60, 220), "yellow": (235, 215, 40),
    "purple": (140, 40, 170), "white": (245, 245, 245), "black": (20, 20, 20), "orange": (240, 130, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(frozen=True)
class Row:
    picture: Image.Image
    caption: str
    attributes: dict[str, str]


@dataclass(frozen=True)
class Rows:
    rows: list[Row]
    filler: np.ndarray | None = None
    normaliser: float = 1.0


def drawn(shape: str, colour: str, background: str, rnd: random.Random, side: int = 224) -> Row:
    """A shape somewhere on a plain ground; colours vary a little."""

    def near(name: str) -> tuple[int, int, int]:
        r, g, b = (max(0, min(255, v + rnd.randint(-15, 15))) for v in COLOURS[name])
        return r, g, b

    picture = Image.new("RGB", (side, side), near(background))
    draw, fill = ImageDraw.Draw(picture), near(colour)
    r = rnd.randint(round(0.18 * side), round(0.33 * side))
    x, y = rnd.randint(r, side - r), rnd.randint(r, side - r)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        arms = [(r if i % 2 == 0 else 0.4 * r, i * math.pi / 5) for i in range(10)]
        draw.polygon([(x + a * math.sin(t), y - a * math.cos(t)) for a, t in arms], fill=fill)
    attributes = {"colour": colour, "shape": shape, "background": background}
    return Row(picture, f"a {colour} {shape} on a {background} background", attributes)


def combinations(held_out: int, seed: int = 0) -> tuple[list[tuple[str, str, str]], ...]:
    """Shape, colour and background: those to learn from, and those that are held out."""
    every = [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]
    random.Random(seed).shuffle(every)
    return every[held_out:], every[:held_out]


class DrawnPictures(pl.LightningDataModule):
    """``train`` pictures of some combinations, ``valid`` of the others."""

    attribute_values: ClassVar = {
        "colour": list(COLOURS),
        "shape": list(SHAPES),
        "background": list(COLOURS),
    }

    def __init__(
        self, train: int, valid: int, held_out: int = 32, batch_size: int = 16, side: int = 224
    ) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, 0
        rnd = random.Random(1)
        known, unknown = combinations(held_out)
        self.train = [drawn(*rnd.choice(known), rnd, side) for _ in range(train)]
        self.valid = [drawn(*rnd.choice(unknown), rnd, side) for _ in range(valid)]

    def _loader(self, rows: list[Row], training: bool) -> DataLoader[Any]:
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        every = Rows(rows)
        lengths = module.row_lengths(every)
        sampler: Any
        if training:
            accumulate = self.trainer.accumulate_grad_batches  # type: ignore[union-attr]
            sampler = GlobalBatchSampler(
                lengths, self.batch_size, target_counts=module.target_counts(every),
                micro_batches=accumulate,
            )  # fmt: skip
        else:
            sampler = EvalBatchSampler(lengths, self.batch_size)
        collate = module.collator(training=training)

        class Chosen:
            def __len__(self) -> int:
                return len(rows)

            def __getitem__(self, batch: Any) -> Rows:
                return Rows([rows[i] for i in batch.row], batch.filler, batch.normaliser)

        return DataLoader(Chosen(), batch_size=None, sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.valid, False)
