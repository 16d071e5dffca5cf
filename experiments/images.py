"""The command behind ``make images``: download the item images of an experiment's data.

``python -m experiments.images [NAME [key=value ...]]``; NAME and overrides may also come from the
environment (NAME, ARGS), as for ``experiments.run``. Keys that begin with ``images.`` say how to
download; all others are the experiment's own. No torch here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.image_download import Options, Summary, download_images
from datamodules.image_http import Limits
from datamodules.image_ids import SAME, read_ids
from datamodules.image_queue import Politeness
from datamodules.images import download_folder, open_images
from datamodules.prepared import Prepared
from datamodules.sources import cache_root
from experiments import artifacts, config, run
from experiments.errors import UserError
from experiments.keys import nearest
from experiments.messages import print_error, say
from experiments.source_graph import REPO

PREFIX = "images."


@dataclass(frozen=True)
class Request:
    """The keys ``images.*`` of the command line."""

    workers: int = 8  # requests at once
    per_host: int = 4  # of them to one host
    delay: float = 0.0  # seconds between two requests to one host
    max_bytes: int = 20_000_000  # of one image
    max_side: int | None = None  # pixels; larger images are stored smaller
    limit: int | None = None  # only the first so many items
    allow_private: bool = False  # also addresses inside the own network

    def options(self) -> Options:
        """The same for the download."""
        manners = Politeness(workers=self.workers, per_host=self.per_host, delay=self.delay)
        limits = Limits(max_bytes=self.max_bytes, allow_private=self.allow_private)
        return Options(manners, limits, self.max_side)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen), 130 stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        name, words = run.request(list(argv))
        request, overrides = split_request(words)
        experiment = config.load(config.full_name(name), [config.as_text(o) for o in overrides])
        _prepare(experiment)
        asked = [d for d in experiment.data_sets if _has_items(d)]
        return max(_told(data, request, experiment.name) for data in asked)
    except (UserError, DataSourceError, DataFormatError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        return 130


def split_request(words: Sequence[str]) -> tuple[Request, list[str]]:
    """``images.*`` keys as a ``Request``, and the other overrides.

    Raises:
        UserError: an unknown key or a value that it cannot have.
    """
    known = {field.name: str(field.type) for field in fields(Request)}
    given: dict[str, Any] = {}
    for word in (w for w in words if w.startswith(PREFIX)):
        key, _, text = word.removeprefix(PREFIX).partition("=")
        if key not in known:
            options = [PREFIX + name for name in known]
            raise UserError(
                f"unknown key {PREFIX + key!r}{nearest(PREFIX + key, options)} ({', '.join(options)})"
            )
        given[key] = _value(key, text, known[key])
    return Request(**given), [w for w in words if not w.startswith(PREFIX)]


def _value(key: str, text: str, kind: str) -> Any:
    """A value of a field of ``Request``, from its text and its annotation."""
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "None" in kind and text.lower() in ("null", "none"):
        return None
    try:
        number = float(text) if kind == "float" else int(text)
        if kind != "bool" and (0 < number < 1e18 or (kind == "float" and number == 0)):
            return number
    except ValueError:
        pass
    expected = {"bool": "true or false", "float": "a number, 0 or more"}.get(kind, "a whole number")
    null = " or null" if "None" in kind else ""
    raise UserError(f"{PREFIX}{key} is {text!r}; expected {expected}{null}")


def _prepare(experiment: config.Experiment) -> None:
    """Have the data prepared by a process that may import torch. Raises UserError."""
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "experiments.check", "--report"]
    command += [experiment.name, *experiment.overrides]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError(f"the data of {experiment.name} could not be prepared; see above")


def _has_items(data: dict[str, Any]) -> bool:
    """Instructions and captioned pictures are rows of a table, and no catalogue."""
    note = artifacts.prepared_data(data, cache_root())
    return note is None or not (Path(note["folder"]) / "rows.parquet").is_file()


def _told(data: dict[str, Any], request: Request, experiment: str) -> int:
    """The status of one data set; another of the same experiment may fare better."""
    try:
        _images_of(data, request, experiment)
    except (UserError, DataSourceError, DataFormatError) as error:
        print_error(error)
        return 2
    return 0


def _images_of(data: dict[str, Any], request: Request, experiment: str) -> None:
    """Download, or look at what the user gave by data.images, and say what there is."""
    note = artifacts.prepared_data(data, cache_root())
    assert note is not None
    prepared = Prepared(Path(note["folder"]))
    items, name = prepared.items, str(prepared.protocol["name"])
    cache = Path(data["cache"]).expanduser() if data.get("cache") else cache_root()
    if data.get("images"):
        print_given(name, items, Path(data["images"]).expanduser(), data, cache)
        return
    if not (items["images"].list.len().fill_null(0) > 0).any():
        raise UserError(
            f"{name} has no image addresses, so there is nothing to download; if you have its images, "
            "give a folder or a tar file of files named by item id (such as 1193.jpg): "
            f'make images NAME={experiment} ARGS="data.images=PATH"'
        )
    say(f"{name}: images of {min(items.height, request.limit or items.height):,} items")
    wanted = items.head(request.limit or items.height)
    print_summary(name, download_images(wanted, download_folder(cache, name), request.options()))


def print_given(
    name: str, items: pl.DataFrame, place: Path, data: dict[str, Any], cache: Path
) -> None:
    """How many of the items a folder or tar of the user's covers. Raises DataSourceError."""
    renamed = read_ids(data.get("image_ids") or SAME, place, items)
    store = open_images(place, cache, name, renamed)
    assert store is not None
    ids = items["item_id"].to_list()
    there, good = int(store.has(ids).sum()), int(store.mask(ids).sum())
    rows = [("items", f"{len(ids):,}"), ("with an image", f"{good:,} ({good / len(ids):.1%})")]
    rows += [("with a file that is no image", f"{there - good:,}")]
    rows += [("without a file", f"{len(ids) - there:,}"), ("images in all", f"{len(store):,}")]
    _print_table(f"{name}: {place}", rows)


def print_summary(name: str, summary: Summary) -> None:
    """What the download folder has, and how it is used."""
    rows = [("items", f"{summary.items:,}"), ("with address", f"{summary.with_address:,}")]
    share = f" ({summary.downloaded / max(1, summary.items):.1%})"
    rows += [("with an image", f"{summary.downloaded:,}{share}, {summary.new:,} of them new")]
    rows += [("size", f"{summary.bytes / 1e6:,.1f} MB")]
    rows += [(f"missing: {reason}", f"{count:,}") for reason, count in summary.missing.items()]
    _print_table(f"{name}: images", rows)
    for host in summary.left_alone:
        say(f"  {host}")
    say(f"folder: {summary.folder}\nthe data finds it by itself; the same command fetches the rest")


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(show_header=False, title=escape(title), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
