"""The command behind ``make preferences``: what a finished run wrote of some users, and what it answered.

``python -m experiments.preferences [NAME [key=value ...]]``. Variables: NAME and ARGS, as for
``experiments.run``; USERS, how many users (10), drawn at random, the same ones each time; OUT, a folder (that
of the test). Written are ``preferences.html``, one file that needs no other, and ``preferences.png``: the
pictures of each history, each text in the order in which they were written, and the candidates with their
probabilities. Titles and texts are data: none of them is markup.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from datamodules.sources import cache_root
from datamodules.types import TEST, VALID
from experiments import artifacts, build, config, preference_page, preference_sheet, stories
from experiments.canvas import SCALE
from experiments.command import exit_status, whole_number
from experiments.errors import UserError
from experiments.messages import put, short
from experiments.run import request
from experiments.shelf import Shelf
from experiments.stories import Story

FILE = "preferences"  # .html and .png
MOST = 100  # users


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    name, overrides = request(list(argv))
    experiment = config.load(config.full_name(name), overrides)
    count = whole_number("USERS", os.environ.get("USERS", "").strip() or "10", 1, MOST)
    for file in written(experiment, count):
        put(short(file))


def written(experiment: config.Experiment, count: int) -> list[Path]:
    """Write the page and the sheet about so many users; the files.

    Raises:
        UserError: there is nothing to tell, or the folder cannot be written.
    """
    test, writer = stories.stages_of(artifacts.plan(experiment, cache_root()))
    data = build.build(test.spec["data"])
    data.seed = test.spec["seed"]
    data.test_code = VALID if test.spec["split"] == "valid" else TEST
    told = stories.told(test, writer, data, count)
    title = f"{experiment.name} {test.name}: {len(told)} of {_users(data)} users, drawn at random"
    shelf = Shelf(data.titles, data.item_images)
    given = os.environ.get("OUT", "").strip()
    assert test.folder is not None
    folder = Path(given).expanduser() if given else test.folder
    return _saved(folder, title, told, shelf)


def _users(data: stories.SequenceDataModule) -> int:
    return len(set(data.rows(data.test_code).user.tolist()))


def _saved(folder: Path, title: str, told: Sequence[Story], shelf: Shelf) -> list[Path]:
    page, sheet = folder / f"{FILE}.html", folder / f"{FILE}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page.write_text(preference_page.html(title, told, shelf), encoding="utf-8")
        preference_sheet.drawn(title, told, shelf).png(fine=SCALE).save(sheet, optimize=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return [page, sheet]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
