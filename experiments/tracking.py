"""What loggers are told of a stage besides its curves: settings, data, tables, samples, charts, costs.

A logger that can hold them has a ``record`` (``callbacks/wandb_run.py``); others are told nothing here.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import polars
from PIL import Image

from callbacks.wandb_run import Table
from datamodules.base import SequenceDataModule
from datamodules.stage_data import StageDataModule
from datamodules.versioning import read_json
from experiments import config, data_report, plots
from experiments.intervals import CHANCE, of_metric
from experiments.keys import flatten
from experiments.records import peak_memory
from experiments.report import row_label

STARTED = time.monotonic()
TEXTS = 32  # generated texts of a predict stage
SHOWN = ("kind", "row", "user", "history", "prompt", "answer", "place", "label")


def settings(
    folder: Path, job: dict[str, Any], protocol: dict[str, Any], fingerprint: str, row: str = ""
) -> dict[str, Any]:
    """The config of a W&B run; ``method`` is what tables call the row."""
    kept = ("experiment", "stage", "spec", "launch", "overrides", "commit")
    return {
        **{k: job[k] for k in kept},
        "method": row or row_label(job["experiment"], job["stage"]),
        "fingerprint": fingerprint,
        "protocol": protocol,
        "folder": folder.name,
        "provenance": read_json(folder / config.ORIGINS) or {},
        "data_report": dict(line for m in _manifests(folder)[:1] for line in data_report.lines(m)),
    }


def record(
    trainer: pl.Trainer,
    folder: Path,
    job: dict[str, Any],
    data: StageDataModule,
    row: str,
    speed: Mapping[str, float],
    results: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Tell the loggers what came of a stage, or of one row of a test.

    Args:
        trainer: with the loggers; the first process tells.
        folder, job, data: of the stage.
        row: of a test, or the stage's name.
        speed: from ``Throughput.summary``.
        results: of a test: mean and standard error by ``group/metric``.
    """
    holders = [found for found in trainer.loggers if hasattr(found, "record")]
    if not holders or not trainer.is_global_zero:
        return
    numbers = {f"throughput/{name}": value for name, value in speed.items()}
    numbers |= {f"memory/{of}_mib": float(most) for of, most in peak_memory().items()}
    numbers["stage/seconds"] = time.monotonic() - STARTED
    tables = dict(_tables(folder, job, row, results))
    images = dict(_charts(folder, job, row))
    scores = folder / f"scores.{row}.parquet"
    if results and isinstance(data, SequenceDataModule) and "all/hit@1" in results:
        found, lines = _crossover(scores, data)
        numbers |= found
        tables["crossover"] = (("training events of the target", "n", "hit@1"), lines)
    for holder in holders:
        holder.record(numbers, tables, images, scores)


def _tables(
    folder: Path, job: dict[str, Any], row: str, results: Mapping[str, tuple[float, float]] | None
) -> Iterator[tuple[str, Table]]:
    origins = read_json(folder / config.ORIGINS) or {}
    leaves = flatten({**job["spec"], "launch": job["launch"]})
    places = ((k, v, (f"stages.{job['stage']}.{k}", k)) for k, v in leaves)
    lines = [
        (
            k,
            str(v),
            next((o for p in tried if (o := config.origin_of(p, origins)) != "default"), "default"),
        )
        for k, v, tried in places
    ]
    yield "settings", (("setting", "value", "from"), lines)
    told = [
        (m["recipe"]["name"], *line) for m in _manifests(folder) for line in data_report.lines(m)
    ]
    yield "data_report", (("data", "name", "value"), told)
    if results:
        found = {n: {"value": value, "stderr": error} for n, (value, error) in results.items()}
        spans = {n: None if row == CHANCE else of_metric(found, n) for n in found}
        yield "results", (("group", "metric", "value", "low", "high"), [
            (*name.split("/"), _number(value), *((span.low, span.high) if span else (None, None)))
            for (name, (value, _)), span in zip(results.items(), spans.values(), strict=True)
        ])  # fmt: skip
    samples = read_json(folder / f"samples.{row}.json", list) or []
    if samples:
        yield "samples", ((*SHOWN, "items", "picture"), [_sample(one) for one in samples])
    file = folder / "predictions.parquet"
    if file.is_file():
        frame = polars.read_parquet(file)
        names = [c for c, kind in frame.schema.items() if not kind.is_nested()]
        some = frame.gather_every(max(1, -(-frame.height // TEXTS))).select(names)
        yield "texts", (names, some.rows())


def _number(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _sample(one: dict[str, Any]) -> list[Any]:
    """A record of ``callbacks/samples.py`` as cells; the picture of its first item that has one."""
    told = {**one, "history": " · ".join(one.get("history", []))}
    items = one.get("items", [])
    lines = (
        f"{'* ' if i.get('target') else ''}{i['title']}"
        + (f" {i['score']:.4g}" if "score" in i else "")
        for i in items
    )
    address = next((i["picture"] for i in items if "picture" in i), None)
    return [
        *(None if told.get(k) is None else str(told[k]) for k in SHOWN),
        "\n".join(lines),
        _picture(address),
    ]


def _picture(address: str | None) -> Image.Image | None:
    if address is None:
        return None
    content = base64.b64decode(address.partition(",")[2])
    return Image.open(io.BytesIO(content)).convert("RGB")


def _charts(folder: Path, job: dict[str, Any], row: str) -> Iterator[tuple[str, Any]]:
    if job["spec"]["run"] == "fit":
        canvas = plots.learning_chart(job["label"], {folder: job["spec"]["seed"]})
        if canvas is not None:
            yield "plots/learning", canvas.png()
    if bins := read_json(folder / f"reliability.{row}.json", list):
        yield (
            "plots/reliability",
            plots.reliability_chart([(job["label"], bins, plots.COLOURS[0])]).png(),
        )


def _crossover(
    scores: Path, data: SequenceDataModule
) -> tuple[dict[str, float], list[tuple[Any, ...]]]:
    """hit@1 by the target's training events: ``crossover/BIN/hit@1`` and ``crossover/BIN/n``, and lines."""
    from experiments import crossover  # scipy is slow to import
    from experiments.intervals import mean_by_row

    targets = crossover.targets_of(scores, crossover.training_counts(data.prepared.folder))
    rows = mean_by_row([scores], (crossover.METRIC,), further=True)
    assert rows is not None  # a ranked test's file
    hits = rows.sort("row")[crossover.METRIC].to_numpy()
    numbers: dict[str, float] = {}
    lines = []
    for name, member in zip(crossover.bin_names(), crossover.bin_members(targets)[1:], strict=True):
        count = int(member.sum())
        share = float(hits[member].mean()) if count else None
        lines.append((name, count, share))
        if share is not None:
            numbers |= {
                f"crossover/{name}/{crossover.METRIC}": share,
                f"crossover/{name}/n": float(count),
            }
    return numbers, lines


def _manifests(folder: Path) -> list[dict[str, Any]]:
    return read_json(folder / data_report.KEPT, list) or []
