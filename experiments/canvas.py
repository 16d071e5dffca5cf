"""A sheet to draw on, kept as a list of shapes: written as SVG, which is text, or as PNG by Pillow."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

DARK, GREY, FAINT, WHITE = "#1A1A1A", "#595959", "#DDDDDD", "#FFFFFF"
SCALE = 2  # pixels of a PNG for each of the sheet
FINE = 2 * SCALE  # those that it is drawn with
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """Points joined by a line."""

    points: Sequence[Point]
    colour: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: str


@dataclass(frozen=True)
class Text:
    """Words on a baseline, upright or turned by 90 degrees to the left."""

    x: float
    y: float
    words: str
    size: int = 12
    anchor: str = "middle"
    colour: str = DARK
    turned: bool = False


@dataclass(frozen=True)
class Picture:
    """Pixels in a rectangle, which they fill."""

    x: float
    y: float
    width: float
    height: float
    image: Image.Image


Shape = Stroke | Box | Dot | Text | Picture


@dataclass
class Canvas:
    """A white sheet of ``width`` by ``height`` and what was drawn on it, in order."""

    width: int
    height: int
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Draw on top of what is there."""
        self.shapes += shapes

    def line(self, a: Point, b: Point, colour: str = DARK, width: float = 1.0) -> None:
        """A straight line."""
        self.add(Stroke([a, b], colour, width))

    def svg(self) -> str:
        """The text of an SVG file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif">'
        )
        sheet = f'<rect width="{self.width}" height="{self.height}" fill="{WHITE}"/>'
        return "\n".join([head, sheet, *self._svg_shapes(), "</svg>"]) + "\n"

    def _svg_shapes(self) -> Iterator[str]:
        for s in self.shapes:
            if isinstance(s, Stroke):
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in s.points)
                dashes = ' stroke-dasharray="5 4"' if s.dashed else ""
                yield (
                    f'<polyline points="{points}" fill="none" stroke="{s.colour}" '
                    f'stroke-width="{s.width}" stroke-linejoin="round"{dashes}/>'
                )
            elif isinstance(s, Box):
                yield (
                    f'<rect x="{s.x:.1f}" y="{s.y:.1f}" width="{s.width:.1f}" '
                    f'height="{s.height:.1f}" fill="{s.colour}"/>'
                )
            elif isinstance(s, Dot):
                yield f'<circle cx="{s.x:.1f}" cy="{s.y:.1f}" r="{s.radius:.1f}" fill="{s.colour}"/>'
            elif isinstance(s, Picture):
                yield (
                    f'<image x="{s.x:.1f}" y="{s.y:.1f}" width="{s.width:.1f}" height="{s.height:.1f}" '
                    f'preserveAspectRatio="none" href="{data_address(s.image)}"/>'
                )
            else:
                turn = f' transform="rotate(-90 {s.x:.1f} {s.y:.1f})"' if s.turned else ""
                yield (
                    f'<text x="{s.x:.1f}" y="{s.y:.1f}" text-anchor="{s.anchor}" font-size="{s.size}" '
                    f'fill="{s.colour}"{turn}>{escape(s.words)}</text>'
                )

    def png(self, fine: int = FINE) -> Image.Image:
        """The same as pixels.

        Args:
            fine: pixels that are drawn for each of the sheet, a multiple of ``SCALE``; ``SCALE`` itself takes
                a quarter of the memory: for sheets of words and pictures, without lines to smooth.
        """
        image = Image.new("RGB", (self.width * fine, self.height * fine), WHITE)
        draw = ImageDraw.Draw(image)
        for s in self.shapes:
            if isinstance(s, Stroke):
                pieces = _dashes(s.points) if s.dashed else [s.points]
                for piece in pieces:
                    whole = [(x * fine, y * fine) for x, y in piece]
                    draw.line(whole, s.colour, max(1, round(s.width * fine)), joint="curve")
            elif isinstance(s, Box):
                if s.width > 0 and s.height > 0:
                    corner = ((s.x + s.width) * fine - 1, (s.y + s.height) * fine - 1)
                    draw.rectangle([(s.x * fine, s.y * fine), corner], s.colour)
            elif isinstance(s, Dot):
                r = s.radius * fine
                x, y = s.x * fine, s.y * fine
                draw.ellipse([(x - r, y - r), (x + r, y + r)], s.colour)
            elif isinstance(s, Picture):
                size = (max(1, round(s.width * fine)), max(1, round(s.height * fine)))
                shown = s.image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
                image.paste(shown, (round(s.x * fine), round(s.y * fine)))
            elif s.turned:
                _turned(image, s, fine)
            else:
                place = (s.x * fine, s.y * fine)
                draw.text(place, s.words, s.colour, _font(s.size * fine), _ANCHORS[s.anchor])
        return image.reduce(fine // SCALE)  # so that lines have smooth edges

    def write(self, stem: Path) -> list[Path]:
        """Write ``stem``.svg and ``stem``.png."""
        files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
        files[0].write_text(self.svg(), encoding="utf-8")
        self.png().save(files[1])
        return files


def _dashes(points: Sequence[Point], on: float = 5, off: float = 4) -> Iterator[list[Point]]:
    """The straight pieces of a dashed line."""
    for (x1, y1), (x2, y2) in pairwise(points):
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        at = 0.0
        while at < length:
            ends = (at / length, min(at + on, length) / length)
            yield [(x1 + (x2 - x1) * e, y1 + (y2 - y1) * e) for e in ends]
            at += on + off


def _turned(image: Image.Image, text: Text, fine: int) -> None:
    """Draw words from below to above; they are centred."""
    font = _font(text.size * fine)
    width, height = round(font.getlength(text.words)) + 4, round(text.size * fine * 1.5)
    label = Image.new("RGB", (width, height), WHITE)
    ImageDraw.Draw(label).text((width / 2, text.size * fine), text.words, text.colour, font, "ms")
    label = label.rotate(90, expand=True)
    place = (round(text.x * fine) - text.size * fine, round(text.y * fine - width / 2))
    image.paste(label, place)


def data_address(image: Image.Image, quality: int = 85) -> str:
    """A picture as an address that holds it: a JPEG file in base64."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def text_width(words: str, size: int) -> float:
    """How wide words are; with some room, since a browser's font may be wider than ours."""
    return float(_font(size * SCALE).getlength(words)) / SCALE * 1.12


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return found
