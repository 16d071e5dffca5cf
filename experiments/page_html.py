"""HTML as text, escaped: whatever is not ``Html`` already is data, and cannot become markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Nothing may be fetched, and no script can run, whatever a title or a generated text holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --soft: #f4f5f7; --line: #d9dce1; --ink: #1b1e23;
  --faint: #5c6470; --link: #0b63b0; --mark: #0b6e4f; --warn: #9a4a00; --shade: #0004; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181d; --soft: #1e2229; --line: #3a414c;
  --ink: #e7e9ec; --faint: #a3abb7; --link: #79b8ff; --mark: #6fd3a9; --warn: #f0b072; --shade: #fff5; }
  .chart svg { filter: invert(.915) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 4rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .6rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 62rem; } .faint { color: var(--faint); font-size: .9rem; }
nav { margin: .8rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; } a { color: var(--link); }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0;
  scrollbar-width: thin; background:  /* a shadow at the right, until the end is reached */
  linear-gradient(to left, var(--ground) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 1.2rem 100% no-repeat scroll; }
@media (max-width: 48rem) { .scroll:has(> .numbers)::before { content: "more columns to the right →";
  position: sticky; left: 0; display: inline-block; padding: .2rem .6rem; color: var(--faint);
  font-size: .8rem; } }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th, tbody.group th[colspan] { background: var(--soft); white-space: nowrap; }
.numbers td + td, .numbers thead th + th { text-align: right; white-space: nowrap; }
.numbers td:first-child, .numbers thead th:first-child { position: sticky; left: 0;
  min-width: min(15rem, 45vw);
  max-width: 45vw;  overflow-wrap: anywhere; background: var(--ground); }
.numbers thead th:first-child { background: var(--soft); }
tbody.group th[colspan] > span { position: sticky; left: .6rem; } .plain td { color: var(--faint); }
.plain td:first-child { font-style: italic; }
.chart svg { display: block; max-width: 100%; height: auto; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
.charts > * { min-width: 0; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .1rem .8rem; }
summary { cursor: pointer; padding: .35rem 0; font-weight: 600; overflow-wrap: anywhere; }
details[open] > summary { margin-bottom: .3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; padding: .5rem .7rem;
  background: var(--soft); border-radius: 6px; font: .84rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace;
  max-height: 20rem; overflow-y: auto; }
.cards { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; min-width: 0; }
.card ol { margin: .3rem 0; padding: 0; list-style: none; overflow-wrap: anywhere; }
.card li { display: flex; gap: .6rem; align-items: center; padding: .15rem 0; }
.card li .score { margin-left: auto; color: var(--faint); font-variant-numeric: tabular-nums; }
.card img { width: 48px; height: 48px; object-fit: contain; background: var(--soft); border-radius: 4px;
  flex: none; }
.target { color: var(--mark); font-weight: 600; } .warn { color: var(--warn); }
.label { color: var(--faint); font-size: .8rem; text-transform: uppercase; letter-spacing: .03em; }
"""


class Html(str):
    """Text that is markup."""

    __slots__ = ()


def text(value: object) -> Html:
    """Data as markup."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def breakable(words: str) -> Html:
    """A name that may go on in the next line behind its slashes and underscores."""
    return Html(escape(words).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def tag(name: str, *children: object, **attributes: str) -> Html:
    """An element; ``class_`` stands for ``class``, and what is not ``Html`` is escaped."""
    told = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items() if v)
    inside = "".join(map(text, children))
    return Html(f"<{name}{told}>{inside}</{name}>")


def image(address: str, words: str) -> Html:
    """A picture that is part of the page; nothing where an address is not ``data:image/``."""
    if not address.startswith("data:image/"):
        return Html()
    return Html(f'<img src="{escape(address)}" alt="{escape(words)}">')


def join(parts: Iterable[object]) -> Html:
    """One after the other."""
    return Html("\n".join(map(text, parts)))


def table(heads: Sequence[object], rows: Sequence[Sequence[object]], numbers: bool = False) -> Html:
    """A table that scrolls by itself where it is wider than the screen."""
    body = tag("tbody", *(tag("tr", *(tag("td", c) for c in row)) for row in rows))
    return framed([tag("th", h, scope="col") for h in heads], [body], numbers)


def framed(heads: Sequence[Html], bodies: Sequence[Html], numbers: bool = False) -> Html:
    """The same of rows that are there already."""
    whole = tag("table", tag("thead", tag("tr", *heads)), *bodies, class_="numbers" * numbers)
    return tag("div", whole, class_="scroll", tabindex="0")


def folded(title: object, *inside: object, opened: bool = False) -> Html:
    """What is shown when one asks for it."""
    made = tag("details", tag("summary", title), *inside)
    return Html(made.replace("<details>", "<details open>", 1)) if opened else made


def document(title: str, *body: object) -> str:
    """A whole page that needs nothing besides itself."""
    head = join(
        (
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<link rel="icon" href="data:,">'),
            tag("title", title),
            tag("style", Html(_STYLE)),
        )
    )
    lines = ("<!DOCTYPE html>", '<html lang="en"><head>', head, "</head><body>", join(body))
    return "\n".join((*lines, "</body></html>", ""))
