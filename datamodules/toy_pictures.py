"""Drawn product pictures whose every attribute is known: one plain shape on a background, and a brand mark.

Two pictures of one look differ in size, place, turn and shade, as two photos of one kind of product do.
Distances are in pixels of the finished picture, angles in degrees.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SIDE = 224
COLOURS: dict[str, Colour] = {
    "red": (215, 30, 35), "orange": (245, 130, 20), "yellow": (250, 215, 40),
    "green": (40, 155, 65), "blue": (35, 85, 215), "purple": (135, 50, 165),
}  # fmt: skip
BACKGROUNDS: dict[str, Colour] = {
    "white": (245, 245, 245), "grey": (150, 150, 150), "black": (25, 25, 25), "pink": (250, 195, 210),
}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted")  # of the background
MARKS = ("A", "H", "O", "X")  # capital letters on a white badge
_FINER = 2  # drawn so many times as large, then reduced: smooth edges
_SHADE = 9  # a channel of a shape, or all of a background, is off by so much at most
_TONES = (45, -28)  # stripes and dots are lighter than a dark background, darker than a light one


@dataclass(frozen=True)
class Look:
    """What a picture shows."""

    shape: str
    colour: str
    background: str
    pattern: str = "plain"
    mark: str = "A"

    def caption(self, details: bool = False) -> str:
        """For example ``one red star on a grey background``; with ``details`` its pattern and mark, too.

        No word tells what comes behind it, as the ``an`` of an orange star would.
        """
        told = f"one {self.colour} {self.shape} on "
        told += f"a {self.pattern} {self.background}" if details else f"a {self.background}"
        return f"{told} background" + (f" with the mark {self.mark}" if details else "")


LOOK = tuple(field.name for field in fields(Look))  # the attributes of a picture


def _regular(corners: int, inner: float = 1.0) -> list[Point]:
    """A polygon of circumradius 1, its first corner on top; ``inner``: every second corner's radius."""
    turns = ((i, math.tau * i / corners) for i in range(corners))
    return [
        (math.sin(a) * (inner if i % 2 else 1), -math.cos(a) * (inner if i % 2 else 1))
        for i, a in turns
    ]


def _heart() -> list[Point]:
    around = [math.tau * i / 90 for i in range(90)]
    points = [
        (
            16 * math.sin(t) ** 3,
            -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t),
        )
        for t in around
    ]
    return [(x / 17.5, y / 17.5) for x, y in points]


def _cross(arm: float = 0.34, end: float = 0.94) -> list[Point]:
    quarter = [(-arm, -end), (arm, -end), (arm, -arm)]
    corners: list[Point] = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


SHAPES: dict[str, list[Point]] = {  # outlines within the unit circle, y downwards
    "circle": [(0.88 * x, 0.88 * y) for x, y in _regular(90)],
    "square": [(x * 0.71, y * 0.71) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "triangle": _regular(3),
    "star": _regular(10, inner=0.42),
    "heart": _heart(),
    "cross": _cross(),
}


def draw(look: Look, key: str) -> Image.Image:
    """An RGB picture of ``SIDE`` x ``SIDE``: a function of the look and of ``key``."""
    from PIL import Image, ImageDraw

    chance = random.Random(f"{key}:{look}")
    ground = _shifted(BACKGROUNDS[look.background], chance.randint(-_SHADE, _SHADE))
    canvas = Image.new("RGB", (SIDE * _FINER, SIDE * _FINER), ground)
    pen = ImageDraw.Draw(canvas)
    _fill_pattern(pen, look.pattern, ground, chance)
    ink = _near(COLOURS[look.colour], chance)
    outline = [(x * _FINER, y * _FINER) for x, y in _placed(SHAPES[look.shape], chance)]
    pen.polygon(outline, fill=ink)
    edge = [*outline, outline[0], outline[1]]
    pen.line(edge, fill=_shifted(ink, -60), width=3 * _FINER, joint="curve")
    _stamp(pen, look.mark, chance)
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _near(colour: Colour, chance: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, c + chance.randint(-_SHADE, _SHADE))) for c in colour)
    return red, green, blue


def _shifted(colour: Colour, by: int) -> Colour:
    red, green, blue = (min(255, max(0, c + by)) for c in colour)
    return red, green, blue


def _fill_pattern(
    pen: ImageDraw.ImageDraw, pattern: str, ground: Colour, chance: random.Random
) -> None:
    tone = _shifted(ground, _TONES[0] if sum(ground) < 300 else _TONES[1])
    begin, side = chance.randint(0, 27), SIDE * _FINER
    for x in range(begin - 28, SIDE, 28):
        if pattern == "striped":
            pen.rectangle((x * _FINER, 0, (x + 13) * _FINER, side), fill=tone)
        if pattern == "dotted":
            for y in range(begin - 28, SIDE, 28):
                box = (x * _FINER, y * _FINER, (x + 14) * _FINER, (y + 14) * _FINER)
                pen.ellipse(box, fill=tone)


def _placed(shape: Sequence[Point], chance: random.Random) -> list[Point]:
    """An outline turned, enlarged and moved a little; it always leaves the badge free."""
    angle, radius = math.radians(chance.uniform(-12, 12)), chance.uniform(64, 78)
    left, top = chance.uniform(98, 110), chance.uniform(94, 106)
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return [(left + x * cos - y * sin, top + x * sin + y * cos) for x, y in shape]


def _stamp(pen: ImageDraw.ImageDraw, mark: str, chance: random.Random) -> None:
    """The badge in the lower right corner."""
    from PIL import ImageFont

    left, top = 174 + chance.randint(-3, 3), 174 + chance.randint(-3, 3)
    box = tuple(v * _FINER for v in (left, top, left + 40, top + 40))
    black = (10, 10, 10)
    pen.rounded_rectangle(
        box, radius=8 * _FINER, fill=(255, 255, 255), outline=black, width=2 * _FINER
    )
    font = ImageFont.load_default(size=32 * _FINER)
    middle = ((left + 20) * _FINER, (top + 20) * _FINER)
    pen.text(middle, mark, fill=black, font=font, anchor="mm", stroke_width=_FINER)
