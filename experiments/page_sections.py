"""The parts of a report page, each from run folders; an empty part is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, compared, config, data_report, intervals, plots, report
from experiments.canvas import Canvas
from experiments.errors import UserError
from experiments.keys import flatten
from experiments.page_html import Html, breakable, folded, framed, join, table, tag
from experiments.report import plain
from experiments.results import Row

# Results ------------------------------------------------------------------------------------------------


def results(methods: Sequence[Row], beside: Sequence[Row], readable: Sequence[Row]) -> Html:
    """The table of a protocol, its charts (of scores: of ``readable``) and what it was measured by."""
    rows = [*methods, *beside]
    parts: list[object] = [result_table(rows), *_remarks(rows)]
    canvases = [c for name, c in plots.drawn(rows) if not name.startswith("learning")]
    told = _crossover(readable)
    canvases += [told] if isinstance(told, Canvas) else []
    parts.append(tag("div", *map(chart, canvases), class_="charts"))
    if isinstance(told, str):
        parts.append(tag("p", told, class_="faint"))
    protocol = [(k, tag("code", _value(v))) for k, v in sorted(methods[0].protocol.items())]
    parts.append(
        folded("Protocol: what numbers of one fingerprint share", table(("", ""), protocol))
    )
    return join(parts)


def result_table(rows: Sequence[Row]) -> Html:
    """A body for each group of rows; methods first, then rows without a model."""
    columns = report.columns_of([r.values for r in rows])
    groups = report.groups_of((n, v) for r in rows for n, told in r.values.items() for v in told)
    heads = [tag("th", h, scope="col") for h in ("method", "n", "seeds", *columns)]
    bodies = []
    for group in groups:
        name = tag("span", group.replace("_", " "))
        title = tag("th", name, colspan=str(len(heads)), scope="rowgroup")
        lines = [
            tag(
                "tr",
                tag("td", breakable(row.label + (" *" if row.older else ""))),
                tag("td", f"{compared.value_of(row, f'{group}/n').value or 0:,.0f}"),
                tag("td", row.seed_count),
                *(tag("td", str(compared.value_of(row, f"{group}/{c}"))) for c in columns),
                class_="plain" * row.reference,
            )
            for row in rows
        ]
        bodies.append(tag("tbody", tag("tr", title), *lines, class_="group"))
    return framed(heads, bodies, numbers=True)


def _remarks(rows: Sequence[Row]) -> Iterator[Html]:
    over = "draws users anew" if rows[0].labelled else "takes rows as independent"
    told = [f"± is half of the 95 % interval ({over}, or over seeds), {intervals.ALIKE}."]
    if rows[0].validation:
        told.append(f"These are {rows[0].protocol['scored']} rows: for choosing, not for telling.")
    if any(r.reference for r in rows):
        told.append(
            "Rows in italics have no model; a method that does not beat them has shown nothing."
        )
    told += (f"{n}." for n in data_report.group_notes(f.parent for r in rows for f in r.scores))
    if any(r.older for r in rows):
        told.append('* made by older code; make exp with ARGS="stale=rerun" makes it anew.')
    yield tag("p", " ".join(told), class_="faint")


def _crossover(methods: Sequence[Row]) -> Canvas | str | None:
    """hit@1 by the target's training events, of methods that rank; or why there is none."""
    if not methods or methods[0].labelled or "all/hit@1" not in methods[0].values:
        return None
    from experiments import crossover  # torch and scipy are slow to import

    try:
        found = crossover.measured(methods)
    except UserError as error:
        return f"No chart by training events: {error}"
    if found is None:
        return "No chart by training events: the prepared data are no longer in the cache."
    return crossover.chart(str(methods[0].protocol["name"]), found)


def chart(canvas: Canvas) -> Html:
    """A chart as part of the page."""
    return tag("div", Html(canvas.svg()), class_="chart")


def learning(rows: Sequence[Row]) -> Html:
    """Loss and validation of each fit that logged two epochs or more."""
    found = [chart(canvas) for _, canvas in plots.learning(rows)]
    return tag("div", *found, class_="charts") if found else Html()


# Stages -------------------------------------------------------------------------------------------------


def health(folders: Sequence[Path]) -> Html:
    """Speed, memory and time of each stage; a test of several rows has a line for each."""
    heads = (
        "stage", "seconds", "device", "rows/s", "users/s", "tokens/s", "padding", "s/step",
        "peak MiB", "peak GPU MiB", "finished", "code",
    )  # fmt: skip
    lines = []
    for folder in folders:
        done = read_json(folder / "done.json") or {}
        speeds = done.get("throughput") or {}
        each = speeds if any(isinstance(v, dict) for v in speeds.values()) else {"": speeds}
        memory = done.get("peak_memory_mb") or {}
        several = len(each) > 1
        for number, (row, speed) in enumerate(each.items()):
            first = number == 0
            lines.append(
                (
                    (f"{title_of(folder)}: {row}" if first else row)
                    if several
                    else title_of(folder),
                    plain(done.get("seconds", "-")) if first else "",
                    _device(done) if first else "",
                    *(_told(speed, k) for k in ("rows_per_second", "users_per_second")),
                    _told(speed, "tokens_per_second"),
                    f"{speed['padding']:.1%}" if "padding" in speed else "-",
                    _told(speed, "seconds_per_step"),
                    *(_told(memory, k) if first else "" for k in ("host", "gpu")),
                    done.get("finished", "-") if first else "",
                    tag("code", commit_of(folder)) if first else "",
                )
            )
    note = "Speeds are of the last attempt of a resumed stage, memory is the most of its process."
    kept = [i for i in range(len(heads)) if any(line[i] not in ("-", "") for line in lines)]
    shown = [[line[i] for i in kept] for line in lines]
    return join(
        (table([heads[i] for i in kept], shown, numbers=True), tag("p", note, class_="faint"))
    )


def _told(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1_000 else plain(value)


def _device(done: dict[str, Any]) -> str:
    count = done.get("devices", 1)
    return f"{count} × {done.get('device', '?')}" if count != 1 else str(done.get("device", "-"))


def title_of(folder: Path) -> str:
    """The stage of a folder, with its experiment and its seed."""
    job = read_json(folder / "stage.json") or {}
    seed = job.get("spec", {}).get("seed", 0)
    return f"{job.get('label', folder.name)}" + (f" (seed {seed})" if seed else "")


def commit_of(folder: Path) -> str:
    """The git commit that a stage was finished by, with ``+changes`` where the tree differed from it."""
    return str((read_json(folder / "done.json") or {}).get("commit", "unknown"))


# Data and settings --------------------------------------------------------------------------------------


def prepared_of(folder: Path) -> Path | None:
    """The prepared data of a stage; None where the cache has them no longer."""
    spec = (read_json(folder / "stage.json") or {}).get("spec") or {}
    note = artifacts.prepared_data(spec["data"], cache_root()) if spec.get("data") else None
    return Path(note["folder"]) if note else None


def data(folders: Sequence[Path]) -> Html:
    """The data report of each data set that a stage read."""
    parts: list[Html] = []
    manifests = (one for folder in folders for one in _manifests(folder))
    for one in {m["digest"]: m for m in manifests}.values():
        title = f"{one['recipe']['name']} (content {one['digest']})"
        parts.append(folded(title, table(("", ""), data_report.lines(one)), opened=not parts))
    return join(parts)


def _manifests(folder: Path) -> list[dict[str, Any]]:
    """Of the data that a stage read: as it wrote them down, else as the cache has them."""
    prepared = prepared_of(folder)
    return read_json(folder / data_report.KEPT, list) or (
        data_report.manifests(prepared) if prepared else []
    )


def settings(folders: Sequence[Path]) -> Html:
    """Every resolved value of each stage with the file or the override that set it."""
    parts = []
    for folder in folders:
        job = read_json(folder / "stage.json") or {}
        if job:
            lines = [
                (tag("code", k), tag("code", _value(v)), o) for k, v, o in provenance(folder, job)
            ]
            told = table(("setting", "value", "from"), lines)
            parts.append(folded(f"{title_of(folder)} ({os.path.basename(folder)})", told))
    return join(parts)


def provenance(folder: Path, job: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(key, value, origin) of all that a stage was told."""
    found = read_json(folder / config.ORIGINS) or _origins(job)
    stage = f"stages.{job['stage']}"
    single = len(job["spec"]["modules"]) == 1
    told = {**job["spec"], "launch": job["launch"]}
    if single:
        told["module"] = next(iter(told.pop("modules").values()))
    for key, value in flatten(told):
        places = (f"{stage}.{key}", key)
        named = (config.origin_of(place, found) for place in places)
        yield key, value, next((o for o in named if o != "default"), "default")


def _origins(job: dict[str, Any]) -> dict[str, str]:
    """Of runs that did not write them down: as the files are now."""
    try:
        return config.origins(job["experiment"], job["overrides"])
    except (UserError, OSError):
        return {}


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "[]"
    return "null" if value is None else "{}" if value == {} else str(value)
