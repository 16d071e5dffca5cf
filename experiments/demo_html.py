"""What ``demo_desk`` tells, as markup for the page. Titles, texts and requests are data: all is escaped.

The standard library alone: it runs where Gradio is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from experiments.page_html import Html, image, join, tag

# Gradio makes a template of what it shows, in which these mean something.
_TEMPLATE = {"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"}
MARKS = {
    "cold": "among the least trained items, as evaluation counts them",
    "warm": "among the most trained items, as evaluation counts them",
}

STYLE = """
.gradio-container { max-width: 1500px !important; padding: 12px 16px !important; }
.demo { color: var(--body-text-color); font-size: 14px; line-height: 1.4; }
.demo h1 { font-size: 21px; margin: 0; overflow-wrap: anywhere; } .demo p { margin: 2px 0; }
.demo h2 { font-size: 16px; margin: 14px 0 6px; overflow-wrap: anywhere; }
.gradio-container { --body-text-color-subdued: #565d68; }
.dark .gradio-container, .gradio-container.dark { --body-text-color-subdued: #a9b0bb; }
.demo .faint { color: var(--body-text-color-subdued); font-size: 12.5px; }
.demo > h2:first-child { margin-top: 0; }
.demo .warn { color: var(--body-text-color); background: #fff3df; border-left: 4px solid #b45309;
  color: #4a2a00; padding: 8px 12px; border-radius: 4px; overflow-wrap: anywhere; }
.demo .strip { display: flex; gap: 8px; overflow-x: auto; padding: 2px 2px 8px; }
.demo .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 4px;
  max-height: 440px; overflow-y: auto; }
.demo .item { flex: none; width: 84px; font-size: 11.5px; line-height: 1.25; text-align: left; }
.demo .grid .item { width: auto; }
.demo button.item { background: none; border: 1px solid transparent; border-radius: 6px; padding: 2px;
  cursor: pointer; color: inherit; font-weight: 400; display: block; }
.demo .item .tag { display: block; width: fit-content; max-width: 100%; margin: 3px 0 0; padding: 0 5px;
  font-size: 10.5px; overflow: hidden; text-overflow: ellipsis; }
.demo button.item:hover, .demo button.item:focus-visible { border-color: var(--link-text-color); }
.demo .picture { display: flex; height: 104px; align-items: center; justify-content: center;
  background: var(--background-fill-secondary); border-radius: 4px; overflow: hidden; margin-bottom: 3px; }
.demo .picture img { width: 100%; height: 100%; object-fit: contain; margin: 0; }
.demo .words { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
  overflow: hidden; overflow-wrap: anywhere; }
.demo .plain .item { width: 150px; padding: 6px 8px; border: 1px solid var(--border-color-primary);
  border-radius: 6px; } .demo .grid.plain { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.demo .grid.plain .item { width: auto; }
.demo .columns { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 255px), 1fr)); }
.demo .column { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 12px;
  min-width: 0; background: var(--background-fill-primary); }
.demo .column h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
.demo ol { list-style: none; margin: 8px 0 0; padding: 0; }
.demo ol.list > li { display: grid; grid-template-columns: 26px auto 1fr auto; gap: 8px; align-items: center;
  padding: 5px 0; border-top: 1px solid var(--border-color-primary); }
.demo .place { text-align: right; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.demo .small { width: 38px; height: 52px; border-radius: 3px; object-fit: contain; margin: 0;
  background: var(--background-fill-secondary); } .demo .bare { width: 0; }
.demo .told { min-width: 0; overflow-wrap: anywhere; }
.demo .value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.demo .value:has(.bar) { min-width: 78px; }
.demo .value b { font-weight: 600; } .demo .bar { display: block; height: 5px; margin: 2px 0;
  background: var(--background-fill-secondary); border-radius: 3px; overflow: hidden; }
.demo .bar i { display: block; height: 5px; background: #2563a8; }
.demo .tag { display: inline-block; border-radius: 9px; padding: 0 7px; font-size: 11px; margin-right: 5px;
  background: var(--background-fill-secondary); color: var(--body-text-color-subdued); white-space: nowrap; }
.demo .cold { background: #dbeafe; color: #123c7c; } .demo .warm { background: #fde6d3; color: #7a3200; }
.demo .up { background: #d9f2e3; color: #0b5a34; } .demo .down { background: #f3e3ee; color: #6b1d53; }
.demo .steps { display: flex; gap: 10px; overflow-x: auto; padding-bottom: 8px; align-items: stretch; }
.demo .step { flex: 1 0 min(320px, 85%); max-width: 560px; border-radius: 8px; padding: 10px;
  background: var(--background-fill-secondary); min-width: 0; }
.demo .step .strip { flex-wrap: wrap; overflow: visible; } .demo .step .item { width: 64px; }
.demo .step .picture { height: 80px; background: var(--background-fill-primary); }
.demo blockquote { margin: 6px 0 0; padding-left: 10px; border-left: 3px solid #2563a8;
  overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px 6px !important; } .demo .column { padding: 8px 6px; }
  .demo ol.list > li { gap: 6px; grid-template-columns: 20px auto 1fr auto; }
}
"""


def inert(markup: Html) -> str:
    """Markup that Gradio's templates leave as it is."""
    return "".join(_TEMPLATE.get(letter, letter) for letter in markup)


def _page(*parts: object) -> str:
    return inert(tag("div", join(parts), class_="demo"))


def head(about: dict[str, Any]) -> str:
    """What the page is about."""
    facts = f"{about['data']}: {about['users']:,} users, {about['items']:,} items"
    beside = f"; beside it {about['beside']}" if about["beside"] else ""
    return _page(tag("h1", about["experiment"]), tag("p", facts + beside, class_="faint"))


def notice(words: str) -> str:
    """Why there is nothing to show."""
    return _page(tag("p", words, class_="warn", role="status"))


def found(cards: Sequence[dict[str, Any]], words: str) -> str:
    """Items of a search, to be added."""
    if not cards:
        return _page(tag("p", "No title is like that." if words.strip() else "", class_="faint"))
    return _page(_shelf(cards, "Add", "grid"))


def chosen(cards: Sequence[dict[str, Any]]) -> str:
    """A history that somebody makes up, each item to be taken out."""
    if not cards:
        return _page(tag("p", "Nothing yet: search titles, and click what to add.", class_="faint"))
    lead = tag("p", "Oldest first; click one to take it out.", class_="faint")
    return _page(lead, _shelf(cards, "Take out", "grid"))


def answer(view: dict[str, Any]) -> str:
    """History, texts, and lists side by side."""
    return _page(*_parts(view))


def _parts(view: dict[str, Any]) -> Iterable[object]:
    events, shown = view["events"], len(view["history"])
    more = f"; the newest {shown} of {events}" if shown < events else ""
    yield tag("h2", f"{view['who']}, newest first{more}")
    yield _shelf(view["history"], "", "strip")
    if view["steps"]:
        yield tag("h2", "How the summary of the user grew")
        yield tag(
            "div", join(map(_step, view["steps"], range(1, 1000))), class_="steps", tabindex="0"
        )
    elif view["preference"]:
        yield tag("h2", "What the model was told of the user")
        yield tag("blockquote", view["preference"])
    asked = f' for "{view["request"]}"' if view["request"] else ""
    yield tag("h2", f"What to show next{asked}")
    yield tag("div", join(map(_column, view["columns"])), class_="columns")
    if view["reason"]:
        yield tag("h2", "Why the first one, in the model's words")
        yield tag("blockquote", view["reason"])
    if view["dropped"]:
        left = (
            f"{view['dropped']} of its statements left out: the item's metadata do not support them"
        )
        yield tag("p", left, class_="faint")


def _step(step: dict[str, Any], number: int) -> Html:
    cards = step["cards"]
    about = f"{number}. after {len(cards)} more" if cards else f"{number}. joined from those before"
    shelf = _shelf(cards, "", "strip") if cards else ""
    text = step["text"].strip() or "Nothing was written."
    return tag(
        "div", tag("p", about, class_="faint"), shelf, tag("blockquote", text), class_="step"
    )


def _shelf(cards: Sequence[dict[str, Any]], verb: str, kind: str) -> Html:
    """Cards beside each other: buttons where a verb says what a click does."""
    bare = "" if any(c["picture"] for c in cards) else " plain"
    scrolls = {"tabindex": "0"} if kind == "strip" else {}
    return tag("div", *(_card(c, verb, bool(bare)) for c in cards), class_=kind + bare, **scrolls)


def _card(card: dict[str, Any], verb: str, bare: bool) -> Html:
    picture = image(card["picture"], "") or tag("span", "no picture", class_="faint")
    disliked = " (disliked)" if card.get("disliked") else ""
    inside = join((
        "" if bare else tag("span", picture, class_="picture"),
        tag("span", card["title"] + disliked, class_="words"), _mark(card, short=True),
    ))  # fmt: skip
    if not verb:
        return tag("div", inside, class_="item", title=card["title"])
    label = {"aria-label": f"{verb}: {card['title']}", "data-item": card["item"]}
    return tag(
        "button", inside, class_="item", type="button", title=f"{verb} {card['title']}", **label
    )


def _mark(card: dict[str, Any], short: bool = False) -> Html:
    """How often it was trained on, and whether that is cold or warm."""
    count, mark = card["count"], card["mark"]
    times = f"{count:,} event{'s' * (count != 1)}"
    words = " · ".join(filter(None, (mark, f"{count:,}" if short and mark else times)))
    why = f"{times} in training" + (f"; {MARKS[mark]}" if mark else "")
    return tag("span", words, class_=f"tag {mark}".strip(), title=why)


def _column(column: dict[str, Any]) -> Html:
    parts: list[object] = [tag("h3", column["title"]), tag("p", column["note"], class_="faint")]
    if column["error"]:
        parts.append(tag("p", column["error"], class_="warn"))
    pictures = any(row["picture"] for row in column["rows"])
    lines = join(_line(row, pictures) for row in column["rows"])
    return tag("section", *parts, tag("ol", lines, class_="list"), class_="column")


def _line(row: dict[str, Any], pictures: bool) -> Html:
    small = Html('<span class="bare"></span>')
    if pictures:
        drawn = image(row["picture"], "")
        small = Html(drawn.replace("<img ", '<img class="small" ', 1)) if drawn else tag(
            "span", "", class_="small")  # fmt: skip
    told = tag("div", tag("div", row["title"]), _mark(row), _moved(row), class_="told")
    return tag("li", tag("span", row["place"], class_="place"), small, told, _value(row))


def _moved(row: dict[str, Any]) -> Html:
    """Where it stood before: in the list without the request, or else in the one that was handed over."""
    if "before" in row:
        return _arrow(row["before"], row["place"], "was", "without the request")
    if not row["retrieved"]:
        return Html()
    return _arrow(row["retrieved"], row["place"], "retrieved", "in the collaborative model's list")


def _arrow(before: int, now: int, verb: str, where: str) -> Html:
    if not before:
        return tag("span", "new", class_="tag up", title=f"not there {where}")
    kind, sign = ("up", "▲") if before > now else ("down", "▼") if before < now else ("", "=")
    hint = f"number {before} {where}"
    return tag("span", f"{sign} {verb} {before}", class_=f"tag {kind}".strip(), title=hint)


def _value(row: dict[str, Any]) -> Html:
    """The share with a bar, and the score."""
    score = f"{row['score']:,.3f}"
    if row["share"] is None:
        return tag("div", tag("b", score), class_="value", title="score")
    bar = tag("span", tag("i", "", style=f"width:{100 * row['bar']:.1f}%"), class_="bar")
    number = tag("b", f"{row['share']:.3f}")
    return tag("div", number, bar, tag("span", f"score {score}", class_="faint"), class_="value")
