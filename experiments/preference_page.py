"""Stories of users as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from experiments.canvas import data_address
from experiments.shelf import Shelf
from experiments.stories import Answer, Event, Note, Story

NOTHING = "Nothing was written."
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1400px; padding: 24px; color: #1a1a1a; background: #fff;
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 0 0 12px; }
h3 { font-size: 13px; margin: 18px 0 8px; color: #595959; font-weight: 600; }
.lead, .events figcaption, .answers figcaption { color: #595959; }
section { border-top: 1px solid #ddd; margin-top: 24px; padding-top: 20px; }
ol.notes { display: flex; flex-wrap: wrap; gap: 16px; margin: 0; padding: 0; list-style: none; }
ol.notes > li { flex: 1 1 360px; max-width: 680px; background: #f5f6f8; border-radius: 8px; padding: 12px; }
.events, .answers { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 84px; }
figure img, .none { width: 84px; height: 118px; object-fit: contain; background: #fff; display: block;
  border-radius: 3px; }
.none { background: #e4e4e4; color: #595959; font-size: 11px; text-align: center; line-height: 118px; }
figcaption { font-size: 11px; line-height: 1.25; margin-top: 4px; overflow-wrap: anywhere; }
blockquote { margin: 10px 0 0; padding-left: 10px; border-left: 3px solid #0072b2;
  overflow-wrap: anywhere; }
.answers figure { padding: 4px; border: 2px solid transparent; border-radius: 6px; }
.answers figure.right { border-color: #00813f; background: #eaf6ee; }
.p { font-variant-numeric: tabular-nums; font-size: 12px; margin-top: 4px; font-weight: 600; }
.bar { height: 5px; background: #e4e4e4; margin-top: 2px; }
.bar i { display: block; height: 5px; background: #0072b2; }
.right .bar i { background: #00813f; }
""".strip()
# Nothing but what stands in the page itself is ever loaded, whatever a title says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html(title: str, stories: Sequence[Story], shelf: Shelf) -> str:
    """The page.

    Args:
        title: what it is about.
        stories: one section each.
        shelf: the items'.
    """
    lead = (
        "Each box is one text, below the items that it is about; later texts read the one before. Then the "
        "candidates, the likeliest first: p is the probability of a yes, the green frame the right answer."
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="lead">{lead}</p>',
        *(part for story in stories for part in _section(story, shelf)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def heading(story: Story) -> str:
    """Who it is about, and how they were served."""
    first, last = story.places
    many = len(story.answers)
    if not first:
        return f"User {story.user}: none of {many} is right"
    place = f"number {first}" if first == last else f"tied for the places {first} to {last}"
    return f"User {story.user}: the right one is {place} of {many}"


def _section(story: Story, shelf: Shelf) -> Iterator[str]:
    yield f"<section><h2>{escape(heading(story))}</h2>"
    yield '<h3>History and what was written of it</h3><ol class="notes">'
    yield from (_note(note, shelf) for note in story.notes)
    yield "</ol>"
    yield '<h3>Candidates</h3><div class="answers">'
    yield from (_answer(answer, shelf) for answer in story.answers)
    yield "</div></section>"


def _note(note: Note, shelf: Shelf) -> str:
    events = "".join(_event(event, shelf) for event in note.events)
    shown = f'<div class="events">{events}</div>' if events else ""
    return f"<li>{shown}<blockquote>{escape(note.text or NOTHING)}</blockquote></li>"


def _event(event: Event, shelf: Shelf) -> str:
    mark = " (disliked)" if event.disliked else ""
    told = escape(shelf.title(event.item) + mark)
    return f"<figure>{_picture(event.item, shelf)}<figcaption>{told}</figcaption></figure>"


def _answer(answer: Answer, shelf: Shelf) -> str:
    share, right = f"{answer.probability:.3f}", ' class="right"' if answer.right else ""
    bar = f'<div class="bar"><i style="width:{100 * answer.probability:.1f}%"></i></div>'
    title = escape(shelf.title(answer.item)) + (" (right)" if answer.right else "")
    return (
        f'<figure{right}>{_picture(answer.item, shelf)}<div class="p">p {share}</div>{bar}'
        f"<figcaption>{title}</figcaption></figure>"
    )


def _picture(item: int, shelf: Shelf) -> str:
    image = shelf.picture(item)
    if image is None:
        return '<div class="none">no picture</div>'
    return f'<img alt="{escape(shelf.title(item))}" src="{data_address(image)}">'
