"""The command behind ``make report``: one HTML page of finished experiments, from their run folders alone.

``python -m experiments.page [NAME[:STAGE] [key=value ...] ...]``. Variables: NAME or NAMES, ARGS and SEEDS as
for ``make compare``; OUT, the file (``reports/NAME/index.html`` beside the run folders). The page needs no
network, no script and no file besides itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.versioning import read_json
from experiments import artifacts, compared, config, costs, page_texts, seeds
from experiments import page_sections as sections
from experiments.command import exit_status, write_whole
from experiments.compared import Asked
from experiments.errors import UserError
from experiments.intervals import scores_columns
from experiments.messages import put, say, short
from experiments.page_html import Html, document, join, tag
from experiments.results import Row, telling


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    asked = seeds.requested([]) if os.environ.get("SEEDS", "").strip() else ()
    wanted = compared.request(argv)
    page = made(wanted, compared.tables(wanted, asked, artifacts.runs_root()))
    put(short(_written(page, wanted)))


def _written(page: str, wanted: Sequence[Asked]) -> Path:
    """Write the page, whole or not at all."""
    given = os.environ.get("OUT", "").strip()
    name = "+".join(dict.fromkeys(one.name.replace("/", ".") for one in wanted))[:120]
    file = Path(given).expanduser() if given else artifacts.runs_root() / "reports" / name
    file = file if given else file / "index.html"
    write_whole(file, page)
    return file


def made(wanted: Sequence[Asked], tables: Sequence[tuple[list[Row], list[Row]]]) -> str:
    """The text of the page.

    Args:
        wanted: the experiments.
        tables: of each protocol methods, and rows without a model, as ``compared.tables`` has them.
    """
    folders = stages_of(tables)
    broken = unreadable([row for ours, beside in tables for row in (*ours, *beside)])
    for line in broken.values():
        say(line)
    told = {telling(list(one.overrides)) for one in wanted}
    shared = " ".join(*told) if len(told) == 1 else ""  # need not stand in every line
    tables = [([_without(r, shared) for r in ours], beside) for ours, beside in tables]
    parts: list[tuple[str, str, Html]] = []  # anchor, title, content
    for number, (methods, beside) in enumerate(tables, start=1):
        several = f" {number}" if len(tables) > 1 else ""
        title = f"Results{several}: {compared.title_of(methods)}"
        readable = [r for r in methods if not broken.keys() & set(r.scores)]
        lost = [broken[f] for r in (*methods, *beside) for f in r.scores if f in broken]
        warned = join(tag("p", line, class_="warn") for line in lost)
        shown_results = sections.results(methods, beside, readable)
        parts.append((f"results-{number}", title, join((warned, shown_results))))
    parts += [
        ("learning", "Learning curves", sections.learning([r for rows, _ in tables for r in rows])),
        ("stages", "Stages: speed, memory and time", sections.health(folders)),
        ("samples", "Prompts, answers and scores", page_texts.samples(folders)),
        ("texts", "Generated texts", page_texts.texts(folders)),
        ("data", "Data", sections.data(folders)),
        ("settings", "Settings, and where each came from", sections.settings(folders)),
    ]
    shown = [part for part in parts if part[2]]
    names = list(dict.fromkeys(one.name for one in wanted))
    title = ", ".join(names)
    links = (tag("a", name.partition(":")[0], href=f"#{anchor}") for anchor, name, _ in shown)
    return document(
        title,
        tag(
            "header", tag("h1", title), *(tag("p", line) for line in _headers(wanted)),
            tag("p", "with ", tag("code", shared)) if shared else "", _made_at(folders),
        ),
        tag("nav", *links),
        *(tag("section", tag("h2", name), inside, id=anchor) for anchor, name, inside in shown),
    )  # fmt: skip


def unreadable(rows: Sequence[Row]) -> dict[Path, str]:
    """The scores files that are missing or damaged, with a line about each."""
    found = {}
    for file in dict.fromkeys(f for row in rows for f in row.scores):
        try:
            scores_columns(file)
        except UserError as error:
            told = str(error).replace(str(file), f"{file.parent.name}/{file.name}")
            found[file] = f"{told}; charts that need it are left out"
    return found


def _without(row: Row, overrides: str) -> Row:
    """A row whose label does not repeat what all share."""
    return replace(row, label=row.label.removesuffix(f" {overrides}")) if overrides else row


def _headers(wanted: Sequence[Asked]) -> list[Html]:
    told = dict.fromkeys((one.name, config.caption(one.name, one.overrides)) for one in wanted)
    return [join((tag("strong", name), " ", line)) for name, line in told]


def _made_at(folders: Sequence[Path]) -> Html:
    commits = ", ".join(dict.fromkeys(sections.commit_of(f) for f in folders))
    when = time.strftime("%Y-%m-%d %H:%M")
    return tag("p", f"made {when} from {len(folders)} stages, of code {commits}", class_="faint")


def stages_of(tables: Sequence[tuple[list[Row], list[Row]]]) -> list[Path]:
    """The folders of all stages that made the rows, as they ended; those without a model last."""
    found: dict[Path, None] = {}
    ours, beside = ([r for pair in tables for r in pair[kind]] for kind in (0, 1))
    for rows in (ours, beside):
        chains = {
            folder for row in rows for file in row.scores for folder in costs.chain(file.parent)
        }
        found |= dict.fromkeys(sorted(chains, key=_ended))
    return list(found)


def _ended(folder: Path) -> tuple[str, str]:
    return str((read_json(folder / "done.json") or {}).get("finished")), folder.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
