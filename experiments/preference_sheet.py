"""Stories of users as one sheet: a band for each, its texts above and its candidates below."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.canvas import DARK, FAINT, GREY, Box, Canvas, Picture, Text, text_width
from experiments.preference_page import NOTHING, heading
from experiments.shelf import Shelf
from experiments.stories import Answer, Note, Story

WIDTH, MARGIN, GAP = 1500, 24, 14
CARD, PAPER, BLUE, GREEN, LIGHT = "#F5F6F8", "#E4E4E4", "#0072B2", "#00813F", "#EAF6EE"
PICTURE = (72, 104)  # of an event
SMALL = (56, 80)  # of a candidate
MOST = 21  # candidates of a row
TEXT, LINE = 13, 18
CAPTION, CAPTION_LINE = 9, 12
LONGEST = 160  # letters of a caption that are looked at
ACROSS = 3  # texts beside each other, at most


def drawn(title: str, stories: Sequence[Story], shelf: Shelf) -> Canvas:
    """The sheet.

    Args:
        title: what it is about.
        stories: one band each.
        shelf: the items'.
    """
    canvas = Canvas(WIDTH, 0)
    canvas.add(Text(MARGIN, 34, title, 18, "start"))
    canvas.add(Text(
        MARGIN, 56,
        "a box is one text, below the items that it is about; p is the probability of a yes, the green frame "
        "the right answer", 12, "start", GREY,
    ))  # fmt: skip
    y = 72.0
    for story in stories:
        y = _band(canvas, y, story, shelf)
    canvas.height = round(y + 10)
    return canvas


def _band(canvas: Canvas, y: float, story: Story, shelf: Shelf) -> float:
    """Draw a story from ``y`` on; where it ends."""
    canvas.line((MARGIN, y), (WIDTH - MARGIN, y), FAINT)
    canvas.add(Text(MARGIN, y + 24, clipped(heading(story), 15, WIDTH - 2 * MARGIN), 15, "start"))
    y = _notes(canvas, y + 36, story.notes, shelf)
    return _answers(canvas, y, story.answers, shelf) + GAP


def _notes(canvas: Canvas, y: float, notes: Sequence[Note], shelf: Shelf) -> float:
    across = max(1, min(ACROSS, len(notes)))
    width = (WIDTH - 2 * MARGIN - (across - 1) * GAP) / across
    for at in range(0, len(notes), across):
        row = notes[at : at + across]
        height = max(_note_height(note, width) for note in row)
        for number, note in enumerate(row):
            x = MARGIN + number * (width + GAP)
            canvas.add(Box(x, y, width, height, CARD))
            _note(canvas, x + 10, y + 10, width - 20, note, shelf)
        y += height + GAP
    return y


def _columns(width: float) -> int:
    """Events beside each other in a box of this width."""
    return max(1, int((width + 8) // (PICTURE[0] + 8)))


def _lines(note: Note, width: float) -> list[str]:
    return wrapped(note.text or NOTHING, TEXT, width - 12)


def _rows(note: Note, width: float) -> int:
    return -(-len(note.events) // _columns(width))


def _note_height(note: Note, width: float) -> float:
    inner = width - 20
    lines = len(_lines(note, inner)) * LINE
    return 20 + _rows(note, inner) * _event_height() + lines + 8


def _event_height() -> float:
    return PICTURE[1] + 2 * CAPTION_LINE + 12


def _note(canvas: Canvas, x: float, y: float, width: float, note: Note, shelf: Shelf) -> None:
    columns = _columns(width)
    for number, event in enumerate(note.events):
        left = x + number % columns * (PICTURE[0] + 8)
        top = y + number // columns * _event_height()
        _picture(canvas, left, top, PICTURE, event.item, shelf)
        mark = "(disliked) " if event.disliked else ""
        caption = mark + shelf.title(event.item)
        _caption(canvas, left, top + PICTURE[1] + 12, PICTURE[0], caption)
    y += _rows(note, width) * _event_height() + 4
    lines = _lines(note, width)
    canvas.add(Box(x, y, 3, len(lines) * LINE, BLUE))
    for number, line in enumerate(lines):
        canvas.add(Text(x + 12, y + 13 + number * LINE, line, TEXT, "start"))


def _answers(canvas: Canvas, y: float, answers: Sequence[Answer], shelf: Shelf) -> float:
    shown = _shown(answers)
    each = (WIDTH - 2 * MARGIN) / MOST
    height = SMALL[1] + 30 + 2 * CAPTION_LINE
    for number, answer in enumerate(shown):
        x = MARGIN + number * each
        if answer.right:
            canvas.add(Box(x, y, each - 4, height, GREEN))
            canvas.add(Box(x + 2, y + 2, each - 8, height - 4, LIGHT))
        left, room = x + (each - 4 - SMALL[0]) / 2, each - 12
        _picture(canvas, left, y + 6, SMALL, answer.item, shelf)
        colour = GREEN if answer.right else DARK
        told = f"p {answer.probability:.3f}"
        canvas.add(Text(x + (each - 4) / 2, y + SMALL[1] + 18, told, 11, "middle", colour))
        canvas.add(Box(left, y + SMALL[1] + 21, SMALL[0], 3, PAPER))
        filled = SMALL[0] * answer.probability
        canvas.add(Box(left, y + SMALL[1] + 21, filled, 3, GREEN if answer.right else BLUE))
        _caption(canvas, x + 4, y + SMALL[1] + 34, room, shelf.title(answer.item))
    y += height
    if len(shown) < len(answers):
        left_out = f"{len(answers) - len(shown)} more candidates are left out here"
        canvas.add(Text(MARGIN, y + 14, left_out, 11, "start", GREY))
        y += 20
    return y


def _shown(answers: Sequence[Answer]) -> list[Answer]:
    """The likeliest, and the right ones in any case, as many as fit."""
    right = [n for n, a in enumerate(answers) if a.right][:MOST]
    others = [n for n, a in enumerate(answers) if not a.right][: MOST - len(right)]
    return [answers[n] for n in sorted([*right, *others])]


def _picture(
    canvas: Canvas, x: float, y: float, size: tuple[int, int], item: int, shelf: Shelf
) -> None:
    """The item's picture in the middle of its place, in its own proportions."""
    width, height = size
    image = shelf.picture(item)
    if image is None:
        canvas.add(Box(x, y, width, height, PAPER))
        canvas.add(Text(x + width / 2, y + height / 2 + 3, "no picture", CAPTION, "middle", GREY))
        return
    scale = min(width / image.width, height / image.height)
    own = (image.width * scale, image.height * scale)
    canvas.add(Picture(x + (width - own[0]) / 2, y + (height - own[1]) / 2, *own, image))


def _caption(canvas: Canvas, x: float, y: float, width: float, words: str) -> None:
    """Two lines of small words."""
    lines = wrapped(words[:LONGEST], CAPTION, width)
    if len(lines) > 2:
        lines = [lines[0], words[len(lines[0]) :].strip()]  # clipped below
    for number, line in enumerate(lines):
        at = y + number * CAPTION_LINE
        canvas.add(Text(x, at, clipped(line, CAPTION, width), CAPTION, "start", GREY))


def wrapped(words: str, size: int, width: float) -> list[str]:
    """Words on as many lines as they need; a word that is wider than a line is cut in two."""
    lines: list[str] = []
    for word in (piece for whole in words.split() for piece in _pieces(whole, size, width)):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]


def _pieces(word: str, size: int, width: float) -> list[str]:
    """A word in parts that each fit on a line."""
    if text_width(word, size) <= width or len(word) < 2:
        return [word]
    half = len(word) // 2
    return [*_pieces(word[:half], size, width), *_pieces(word[half:], size, width)]


def clipped(words: str, size: int, width: float) -> str:
    """Words as far as they fit, with three points where they do not."""
    if text_width(words, size) <= width:
        return words
    kept = len(words)
    while kept and text_width(words[:kept].rstrip() + "...", size) > width:
        kept -= 1
    return words[:kept].rstrip() + "..."
