"""What models were asked and what they wrote, as parts of a report page; an empty part is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from datamodules.errors import DataFormatError
from datamodules.versioning import read_json
from datamodules.written import read_written
from experiments.frame import PREDICTIONS
from experiments.messages import say
from experiments.page_html import Html, folded, image, join, table, tag
from experiments.page_sections import prepared_of, title_of

TEXTS = 12  # generated texts of a stage
_WORDS = 1_200  # letters of one


def samples(folders: Sequence[Path]) -> Html:
    """What ``callbacks/samples.py`` has kept, a fold for each stage or row."""
    parts: list[Html] = []
    for folder in folders:
        files = sorted(folder.glob("samples.*.json"))
        for file in files:
            name = file.name.removeprefix("samples.").removesuffix(".json")
            title = f"{title_of(folder)} {name}" if len(files) > 1 else title_of(folder)
            cards = [_card(record) for record in read_json(file, list) or []]
            if cards:
                inside = tag("div", *cards, class_="cards")
                parts.append(folded(f"{title} ({len(cards)})", inside, opened=not parts))
    return join(parts)


def _card(record: dict[str, Any]) -> Html:
    parts: list[object] = []
    if record["kind"] == "score":
        parts.append(tag("div", f"row {record['row']}, user {record['user']}", class_="label"))
    if record.get("history"):
        parts += [
            tag("div", "history, oldest first", class_="label"),
            tag("p", " · ".join(record["history"])),
        ]
    for name in ("prompt", "answer"):
        if name in record:
            parts += [tag("div", name, class_="label"), tag("pre", record[name])]
    if record.get("items"):
        parts.append(tag("ol", *map(_item, record["items"])))
    if "place" in record:
        parts.append(tag("p", f"the target's place: {record['place']:,}", class_="faint"))
    if "label" in record:
        parts.append(tag("p", "liked" if record["label"] else "not liked", class_="faint"))
    return tag("div", *parts, class_="card")


def _item(item: dict[str, Any]) -> Html:
    parts: list[object] = [image(item["picture"], item["title"])] if "picture" in item else []
    parts.append(tag("span", item["title"], class_="target" * bool(item.get("target"))))
    if "score" in item:
        parts.append(tag("span", f"{item['score']:.4g}", class_="score"))
    return tag("li", *parts)


def texts(folders: Sequence[Path]) -> Html:
    """Texts of items and users that predict stages have left, evenly over their tables."""
    parts: list[Html] = []
    for folder in folders:
        if not (folder / PREDICTIONS).is_file():
            continue
        try:
            frame = read_written(folder / PREDICTIONS)
        except DataFormatError as error:
            say(str(error))
            parts.append(tag("p", str(error), class_="warn"))
            continue
        kinds = [c for c, kind in frame.schema.items() if kind == pl.String]
        if not kinds or not frame.height:
            continue
        filled = frame.drop_nulls(kinds[0])
        some = filled.gather_every(max(1, -(-filled.height // TEXTS)))
        owner = "item" if "item" in frame.columns else "user" if "user" in frame.columns else ""
        names = _names(folder, owner, some[owner].to_list()) if owner else [""] * some.height
        lines = [
            [name, *(_short(row[k]) for k in kinds)]
            for name, row in zip(names, some.iter_rows(named=True), strict=True)
        ]
        count = f"{filled.height:,} of {frame.height:,} have one"
        parts.append(
            folded(f"{title_of(folder)}: {count}", table((owner, *kinds), lines), opened=not parts)
        )
    return join(parts)


def _names(folder: Path, owner: str, numbers: Sequence[int]) -> list[str]:
    """Titles of items, raw ids of users; their numbers where the prepared data are gone."""
    manifest = prepared_of(folder)
    if manifest is None:
        return [str(n) for n in numbers]
    from datamodules.prepared import Prepared

    prepared = Prepared(manifest)
    column = (
        prepared.items["title"] if owner == "item" else prepared.users["user_id"].cast(pl.String)
    )
    return [
        name or str(n)
        for n, name in zip(numbers, column.gather([n - 1 for n in numbers]), strict=True)
    ]


def _short(words: str | None) -> str:
    if words is None:
        return "-"
    return words if len(words) <= _WORDS else f"{words[:_WORDS]} …"
