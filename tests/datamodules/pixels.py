"""Attributes read off drawn pictures, without the code that draws them."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Written down again, by eye.
COLOURS = {
    "red": (215, 30, 35), "orange": (245, 130, 20), "yellow": (250, 215, 40),
    "green": (40, 155, 65), "blue": (35, 85, 215), "purple": (135, 50, 165),
}  # fmt: skip
BACKGROUNDS = {
    "white": (245, 245, 245), "grey": (150, 150, 150), "black": (25, 25, 25), "pink": (250, 195, 210),
}  # fmt: skip


def nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.abs(colour - palette[name]).sum()))


def colour_of(picture: Image.Image) -> str:
    """By the mean of a patch in the middle of the shape."""
    patch = np.asarray(picture, float)[92:108, 96:112]
    return nearest(patch.mean((0, 1)), COLOURS)


def ground(picture: Image.Image) -> np.ndarray:
    """(160, 32, 3): the strip right of every shape and above the badge."""
    return np.asarray(picture, float)[:160, 192:]


def background_of(picture: Image.Image) -> str:
    """By the median of that strip: the background's own tone or that of its stripes and dots."""
    tone = np.median(ground(picture).reshape(-1, 3), axis=0)
    tones = {(name, by): np.add(c, by) for name, c in BACKGROUNDS.items() for by in (0, -28, 45)}
    return min(tones, key=lambda key: float(np.abs(tone - tones[key]).sum()))[0]


def pattern_of(picture: Image.Image) -> str:
    """Plain: one tone. Striped: columns differ, and none of them changes on its way down. Else dotted."""
    tones = ground(picture).mean(2)
    if tones.std() < 2:
        return "plain"
    return "striped" if tones.std(0).max() < 2 else "dotted"


def outline_of(picture: Image.Image) -> np.ndarray:
    """(32, 32) bool: where the shape is, cut out and brought to one size."""
    pixels = np.asarray(picture, float)
    ink = pixels[92:108, 96:112].mean((0, 1))
    inside = np.abs(pixels - ink).sum(2) < 60
    inside[170:, 170:] = False  # the badge
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    cut = Image.fromarray((inside * 255).astype(np.uint8)).crop(box).resize((32, 32))
    return np.asarray(cut) > 127


def badge_of(picture: Image.Image) -> np.ndarray:
    """(20, 20) bool: the letter on the badge, cut out and brought to one size."""
    dark = np.asarray(picture.convert("L"), float)[180:209, 180:209] < 128
    # More than two dark pixels: a corner of the frame may show.
    y, x = np.flatnonzero(dark.sum(1) > 2), np.flatnonzero(dark.sum(0) > 2)
    letter = Image.fromarray((dark * 255).astype(np.uint8)).crop((x[0], y[0], x[-1] + 1, y[-1] + 1))
    return np.asarray(letter.resize((20, 20))) > 127


def like_the_nearest(known: list[np.ndarray], names: list[str], asked: np.ndarray) -> str:
    """The name of the known mask that overlaps most with the one that is asked about."""
    overlap = [(asked & mask).sum() / (asked | mask).sum() for mask in known]
    return names[int(np.argmax(overlap))]
