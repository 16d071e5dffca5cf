"""``make results``: a Markdown table for each protocol, from the run folders, and the README (PUBLISH=1)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.versioning import read_json
from experiments import carried, config
from experiments.artifacts import PlannedStage, done_mark
from experiments.command import write_whole
from experiments.data_report import group_notes
from experiments.errors import UserError
from experiments.intervals import ALIKE, CHANCE, Interval, of_seeds, paired
from experiments.report import PLACES, Measured, is_labelled, measured, print_table, row_label
from experiments.source_graph import changed_since
from experiments.table_text import spread

COLUMNS = (
    "all/hit@10",
    "all/ndcg@10",
    "all/mrr",
    "cold_item/ndcg@10",
    "warm_item/ndcg@10",
    "cold_user/ndcg@10",
    "warm_user/ndcg@10",
)
# Of rows that are labelled: nothing of theirs is ranked.
LABELLED_COLUMNS = (
    "all/auc",
    "all/uauc",
    "all/ece",
    "all/brier",
    "cold_item/auc",
    "warm_item/auc",
    "cold_user/auc",
    "warm_user/auc",
)
COMPARED_WITH = "popularity"
_LEFT_OUT = re.compile(r"~stages\.\w+")
START, END = "<!-- results: start (make results) -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Row:
    """One method on one protocol, over the seeds that were run."""

    label: str
    experiment: str
    overrides: tuple[str, ...]
    reference: bool
    fingerprint: str
    protocol: dict[str, Any]
    seeds: tuple[int, ...]
    values: dict[str, list[float | None]]  # None where a group is empty
    commits: tuple[str, ...]
    older: bool  # made by code that has changed since
    scores: tuple[Path, ...] = ()  # the scores file of each seed

    @property
    def validation(self) -> bool:
        """Whether validation rows were scored: for choosing, not for telling."""
        return "scored" in self.protocol

    @property
    def labelled(self) -> bool:
        """Whether its rows are likes and dislikes, so that nothing is ranked."""
        return is_labelled(self.values)

    @property
    def seed_count(self) -> str:
        """A dash for rows that draw nothing."""
        return str(len(self.seeds)) if self.seeds else "-"

    @property
    def name_in_file(self) -> str:
        """What it is called in its run: its test stage, or its name among rows without a model."""
        return self.scores[0].name.removeprefix("scores.").removesuffix(".parquet")

    def interval(self, name: str) -> Interval | None:
        """Over seeds or, where one was run or all agree, over the rows of the test; chance is exact."""
        if self.reference and self.name_in_file == CHANCE:
            return None
        notes = [read_json(f.with_name("metrics.json")) or {} for f in self.scores]
        return of_seeds([n.get("rows", {}).get(self.name_in_file, {}) for n in notes], name)

    def cell(self, name: str) -> str:
        """Mean, with its 95 % interval where there are several seeds; a dash without rows."""
        told = self.values.get(name, [])
        values = [v for v in told if v is not None]
        if not values or len(values) < len(told):
            return "-"
        span = self.interval(name) if len(values) > 1 else None
        return f"{statistics.fmean(values):.4f}{spread(span, 4)}"


Runs = Mapping[int, tuple[config.Experiment, Sequence[PlannedStage]]]  # by seed
Table = list[tuple[Row, str]]  # of one protocol: rows, and what they gain over ``COMPARED_WITH``


def write_results(runs: Path, repo: Path | None = None) -> Path:
    """Print the tables, and write them.

    Args:
        runs: folders of finished tests.
        repo: whose ``experiments/results.md`` and README's table get these rows, and keep those of runs that
            are not here; None writes ``reports/results.md`` among the runs, of these alone.

    Raises:
        UserError: there is no finished test in ``runs``, or the README has no place for its table.
    """
    rows = list(collect(runs))
    if not rows:
        raise UserError(f"{runs} holds no finished test: run make exp NAME=... first")
    tables = _tables(rows)
    folder = runs / "reports" if repo is None else repo / "experiments"
    folder.mkdir(exist_ok=True)
    lines, file = list(_document(tables)), folder / "results.md"
    if repo is not None and file.is_file():
        before = file.read_text(encoding="utf-8").splitlines()
        lines = carried.with_rows(lines, before, "method", ["method"])
    write_whole(file, "\n".join(lines) + "\n")
    if repo is not None:
        _publish(rows, repo / "README.md")
    _print(tables)
    return folder / "results.md"


def _publish(rows: list[Row], readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UserError(
            f"README.md lacks the lines {START!r} and {END!r} that the table stands between"
        )
    before, _, rest = text.partition(START)
    old, _, after = rest.partition(END)
    new, names = list(_readme_table(rows)), ("experiment", "metric")
    head, rule, *told = carried.with_rows(new, old.splitlines(), "ours", names)
    table = "\n".join([head, rule, *sorted(told, key=lambda line: line.split(" | ")[0])])
    write_whole(readme, f"{before}{START}\n{table}\n{END}{after}")


def collect(runs: Path) -> Iterator[Row]:
    """Every tested row, runs that differ in their seed alone merged."""
    merged: dict[tuple[str, ...], list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], Path]]]
    merged = {}
    for file in sorted(runs.glob("*/metrics.json")):
        folder, metrics = file.parent, read_json(file)
        done, job = done_mark(folder), read_json(folder / "stage.json")
        if not (done and job and metrics and "rows" in metrics and "spec" in job):
            continue
        reference = len(job["spec"]["modules"]) > 1
        for name in metrics["rows"]:
            label = name if reference else row_label(job["experiment"], job["stage"])
            changed = _told(job, name) if reference else telling(job["overrides"])
            key = (metrics["fingerprint"], label, *changed)
            merged.setdefault(key, []).append((job, metrics, done, folder))
    for (fingerprint, label, *rest), found in merged.items():
        found.sort(key=lambda f: str(f[2]["finished"]))  # of a seed that was run twice, the newest
        job, metrics, *_ = found[-1]
        found = [f for f in found if _settings(f[0]) == _settings(job)]  # an edited YAML file
        reference = len(job["spec"]["modules"]) > 1
        name = label if reference else next(iter(metrics["rows"]))  # in the file
        per_seed = {j["spec"]["seed"]: (m["rows"][name], d, f) for j, m, d, f in found}
        yield Row(
            label, job["experiment"], tuple(rest), reference, fingerprint, metrics["protocol"],
            tuple(sorted(per_seed)) if not reference else (),
            {m: [v[m]["value"] for v, *_ in per_seed.values()] for m in metrics["rows"][name]},
            tuple(sorted({d["commit"] for _, d, _ in per_seed.values()})),
            any(changed_since(d["sources"]) for _, d, _ in per_seed.values()),
            tuple(f / f"scores.{name}.parquet" for *_, f in per_seed.values()),
        )  # fmt: skip


def rows_of(runs: Runs) -> list[Row]:
    """Each row of an experiment over its seeds; what all of them share (nothing in it is drawn) counts once.

    Where a seed also draws the data that are learned from, a row has a fingerprint for each seed.
    """
    found: dict[tuple[str, str], dict[int, Measured]] = {}
    for seed, (experiment, stages) in runs.items():
        for one in measured(experiment, stages):
            found.setdefault((one.stage, one.label), {})[seed] = one
    return [_row(label, by_seed) for (_, label), by_seed in found.items()]


def _row(label: str, by_seed: dict[int, Measured]) -> Row:
    kept = list({m.scores: m for m in by_seed.values()}.values())
    first = kept[0]
    shared = len(kept) == 1 and (first.reference or len(by_seed) > 1)
    return Row(
        label, label, (), first.reference, ", ".join(dict.fromkeys(m.fingerprint for m in kept)),
        first.protocol, () if shared else tuple(by_seed),
        {name: [(m.values.get(name) or {"value": None})["value"] for m in kept] for name in first.values},
        (), any(m.older for m in kept), tuple(m.scores for m in kept),
    )  # fmt: skip


def _settings(job: dict[str, Any]) -> list[Any]:
    """What a test and the stages it took its inputs from were told, apart from the seed."""
    spec = _seedless(job["spec"])
    upstream = [read_json(Path(f).parent / "stage.json") for f in job["inputs"].values()]
    return [spec, *(_settings(u) for u in upstream if u)]


def _seedless(node: Any) -> Any:
    """A specification without its seeds: a stage's own, and those that its objects were given."""
    if isinstance(node, dict):
        return {k: _seedless(v) for k, v in node.items() if k != "seed"}
    return [_seedless(v) for v in node] if isinstance(node, list) else node


def _told(job: dict[str, Any], row: str) -> tuple[str, ...]:
    """What a reference row was told beside its defaults (its file tells it nothing)."""
    node = job["spec"]["modules"].get(row) or {}
    return tuple(f"{key}={value}" for key, value in node.items() if key != "_target_")


def telling(overrides: list[str]) -> tuple[str, ...]:
    """Overrides that change what was run, without the seed, the way it was run and where its files lie.

    Other files of the same names have another content, and so another fingerprint. A stage that is left out
    changes no other: what read its files could not be run.
    """
    quiet = ("seed=", "logger", "launch", "+callbacks", "callbacks", "split=", *PLACES)
    told = [o for o in overrides if not o.startswith(quiet) and not _LEFT_OUT.fullmatch(o)]
    return tuple(map(_without_folders, told))


def _without_folders(override: str) -> str:
    """Of a file or folder of the user's the name alone: where it lies is nobody else's business."""
    key, _, value = override.partition("=")
    place = value.strip("'\"")
    return f"{key}={Path(place).name}" if place.startswith(("/", "~")) else override


def _tables(rows: list[Row]) -> list[Table]:
    """One table a fingerprint; the gains, which read the scores files, are worked out here alone."""
    tables = []
    for fingerprint in dict.fromkeys(r.fingerprint for r in rows):
        here = [r for r in rows if r.fingerprint == fingerprint]
        here.sort(key=lambda r: (r.reference, r.label, r.overrides))
        tables.append([(row, gain(row, here)) for row in here])
    return tables


def _document(tables: list[Table]) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Made by `make results` from the run folders. One table for each protocol fingerprint: numbers in"
    yield "different tables must not be compared. ± is half of the 95 % interval over seeds (Student's t), or"
    yield f"over rows where seeds agree, {ALIKE};"
    yield f"of ranked rows the last column but one is the gain in ndcg@10 over {COMPARED_WITH}, with the"
    yield "95 % interval of the paired difference, row by row, of means over seeds. Labelled rows have AUCs"
    yield "(pooled, and the mean over users), and where scores are log-odds their calibration. * marks rows"
    yield f"made by code that has changed since, {carried.MARK} rows of runs that were not at hand."
    for table in tables:
        protocol = table[0][0].protocol
        yield ""
        yield f"## {protocol['name']}, fingerprint {table[0][0].fingerprint}"
        yield ""
        for key in (
            "filters", "split", "ties", "examples", "candidates", "test_rows", "groups", "mask_seen",
            "scored", "content",
        ):  # fmt: skip
            if key in protocol and (key != "candidates" or not table[0][0].labelled):
                yield f"* {key}: {_words(protocol[key])}"
        yield from (f"* {n}" for n in group_notes(f.parent for row, _ in table for f in row.scores))
        yield ""
        columns = _columns(table)
        heads = [*(c.replace("_", " ") for c in columns), *_gain_head(table)]
        yield "| " + " | ".join(("method", "seeds", *heads, "commit")) + " |"
        yield "|---" * (len(heads) + 3) + "|"
        for row, gained in table:
            marks = ["*"] if row.older else []
            label = " ".join([row.label, *(f"`{o}`" for o in row.overrides), *marks])
            cells = [*(row.cell(c) for c in columns), *([] if row.labelled else [gained])]
            yield "| " + " | ".join((label, row.seed_count, *cells, ", ".join(row.commits))) + " |"


def _columns(table: Table) -> tuple[str, ...]:
    """What is told of a table's rows: a protocol's are all labelled, or all ranked."""
    return LABELLED_COLUMNS if table[0][0].labelled else COLUMNS


def _gain_head(table: Table) -> list[str]:
    """The head of the gains, which only ranked rows have."""
    return [] if table[0][0].labelled else [f"ndcg@10 over {COMPARED_WITH}"]


def gain(row: Row, rows: list[Row]) -> str:
    """A row's gain over popularity on the same protocol; a dash where it cannot be told."""
    base = next((r for r in rows if r.reference and r.label == COMPARED_WITH), None)
    if base is None or row is base:
        return "-"
    difference = paired(row.scores, base.scores)
    return "-" if difference is None else str(difference)


def _print(tables: list[Table]) -> None:
    for table in tables:
        first = table[0][0]
        columns = [c for c in _columns(table) if c.startswith("all/")]
        lines = [
            [
                " ".join([r.label, *r.overrides]) + (" *" if r.older else ""), r.seed_count,
                *(r.cell(c) for c in columns), *([] if r.labelled else [gained]),
            ]
            for r, gained in table
        ]  # fmt: skip
        scored = f", {first.protocol['scored']} rows" if first.validation else ""
        print_table(
            f"{first.protocol['name']}{scored}, fingerprint {first.fingerprint}",
            ("method", "seeds", *columns, *_gain_head(table)), lines,
        )  # fmt: skip


def _readme_table(rows: list[Row]) -> Iterator[str]:
    """Experiments as shipped (no overrides but seeds), the known value beside ours."""
    yield "| experiment | command | metric | known value | ours | seeds | fingerprint |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda r: (r.experiment, r.label)):
        if row.reference or row.overrides or row.validation:
            continue
        expected = config.load(row.experiment).config.get("expected") or []
        told = {e["metric"]: f"{e['value']} ({e['source']})" for e in expected}
        usual = "all/auc" if row.labelled else "all/ndcg@10"
        for metric in told or {usual: ""}:
            yield (
                f"| {row.label} | `make exp NAME={row.experiment}` | {metric} | "
                f"{told.get(metric) or '-'} | {row.cell(metric)} | {len(row.seeds)} | {row.fingerprint} |"
            )


def _words(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
