"""Bytes to pictures: what counts as an image, and how every method sees it (RGB, upright, on white).

Images come from strangers. Four formats are tried, the pixel count is looked at before any pixel is
decoded, and whatever a decoder says about damaged bytes becomes one ``BadImageError``.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataFormatError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MAX_PIXELS = 32_000_000  # 96 MB decoded; the largest product photos have about 10 million
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF: which side of the picture is its top
NOT_AN_IMAGE, DAMAGED, TOO_MANY_PIXELS = "not an image", "damaged image", "too many pixels"


class BadImageError(DataFormatError):
    """Bytes that are no image of a known format, or a damaged or huge one; ``reason`` says which."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class ImageFacts:
    """What an image is, as it was sent."""

    format: str
    width: int
    height: int


def inspect(data: bytes) -> ImageFacts:
    """Decode all of an image and say what it is; the picture itself is thrown away.

    Passing means that ``decode`` passes too. PNG checksums are verified as well.

    Raises:
        BadImageError: see ``decode``.
    """
    return _decoded(data, verify=True)[1]


def decode(data: bytes) -> Image.Image:
    """The picture: first frame, turned upright by its EXIF note, RGB, transparent parts on white.

    Raises:
        BadImageError: no JPEG, PNG, WebP or GIF; damaged or cut off; above ``MAX_PIXELS``.
    """
    return _decoded(data, verify=False)[0]


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of what ``decode`` gives; pixels are left alone (a PNG's are not).

    Raises:
        BadImageError: no JPEG, PNG, WebP or GIF, or a damaged beginning.
    """
    from PIL import Image

    _silence_size_warnings()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    except Exception as error:  # as in ``_decoded``
        raise BadImageError(DAMAGED, f"{type(error).__name__}: {error}"[:200]) from error
    return (height, width) if turned else (width, height)


def shrink(data: bytes, max_side: int) -> bytes:
    """The same bytes if no side is above ``max_side`` pixels, else a smaller JPEG (quality 90).

    Raises:
        BadImageError: see ``decode``.
    """
    from PIL import Image

    facts = inspect(data)
    if max(facts.width, facts.height) <= max_side:
        return data
    picture = decode(data)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return out.getvalue()


@cache
def _silence_size_warnings() -> None:
    """Pillow warns of large pictures on the screen; here their pixels are counted and refused."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _decoded(data: bytes, verify: bool) -> tuple[Image.Image, ImageFacts]:
    from PIL import Image, UnidentifiedImageError

    _silence_size_warnings()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImageError(TOO_MANY_PIXELS, f"{width} x {height}, at most {MAX_PIXELS:,}")
            kind = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG with a preview
            if verify:
                _verify(data)
            image.load()
            return _as_seen(image), ImageFacts(kind, width, height)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        start = data[:16]
        raise BadImageError(NOT_AN_IMAGE, f"the first bytes are {start!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # decoders meet damage with any error there is, SyntaxError too
        raise BadImageError(DAMAGED, f"{type(error).__name__}: {error}"[:200]) from error


def _verify(data: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.verify()  # leaves the image unusable, so it has one of its own


def _as_seen(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:  # what lies under it is arbitrary, often black
        drawn = upright.convert("RGBA")
        page = Image.new("RGBA", drawn.size, "white")
        return Image.alpha_composite(page, drawn).convert("RGB")
    return upright.convert("RGB")
