"""The Markdown file beside what was exported: data, measured quality, cost, limits. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.versioning import read_json
from experiments import build
from experiments.artifacts import PlannedStage
from experiments.config import Experiment, caption
from experiments.costs import cost_of
from experiments.intervals import of_metric
from experiments.keys import flatten

METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@10", "mrr", "auc", "uauc")
_LIMITS = (
    "Numbers hold for the protocol of the fingerprint above and for no other: other splits, candidates or "
    "filters give other numbers.",
    "It was measured offline, on what people did while another system chose what they saw; it says nothing "
    "of what an online test would.",
    "Histories of people are personal data: what was learned from them may let some of it be guessed.",
)

_ITEMS = {  # by whether words or pictures alone make an item
    True: "It knows an item by its words and pictures: one that says nothing there is scored by nothing.",
    False: "It knows the items of its catalogue alone; one that was not trained on has a vector that says "
    "little.",
}


def write_card(
    folder: Path,
    experiment: Experiment,
    fit: PlannedStage,
    tests: Sequence[PlannedStage],
    counts: Mapping[str, Any],
    files: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Path:
    """Write ``README.md`` into the folder of what was exported.

    Args:
        folder: of the files.
        experiment: it is of.
        fit: the stage that trained it.
        tests: finished tests that read what it trained.
        counts: users, items and interactions of the data.
        files: what each file is, by name.
        notes: what a user should know besides.
    """
    path = folder / "README.md"
    lines = _lines(experiment, fit, tests, counts, files, notes)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _lines(
    experiment: Experiment,
    fit: PlannedStage,
    tests: Sequence[PlannedStage],
    counts: Mapping[str, Any],
    files: Mapping[str, str],
    notes: Sequence[str],
) -> Iterator[str]:
    assert fit.folder is not None
    done = read_json(fit.folder / "done.json") or {}
    (module,) = fit.spec["modules"].values()
    yield from (f"# {experiment.name}", "", caption(experiment.name, experiment.overrides), "")
    yield from (f"- `{name}`: {what}" for name, what in files.items())
    yield from ("", "## Data", "")
    told = ", ".join(
        f"{counts[k]:,} {k}" for k in ("users", "items", "interactions") if k in counts
    )
    kind, name = fit.spec["data"]["_target_"].rpartition(".")[2], fit.spec["data"].get("name")
    yield from (f"{f'{name} ({kind})' if name else kind}: {told} after filtering.", "")
    yield from (
        "## Training",
        "",
        f"`{module['_target_']}`, stage `{fit.name}`, seed {fit.spec['seed']}:",
        "",
    )
    yield from ("```json", json.dumps(dict(flatten(module)), indent=1, default=str), "```", "")
    if experiment.overrides:
        yield from (f"Overrides: `{' '.join(_without_places(experiment.overrides))}`", "")
    versions = ", ".join(f"{k} {v}" for k, v in (done.get("versions") or {}).items())
    yield from (f"Commit {done.get('commit', 'unknown')}; {versions}.", "")
    yield from ("## Quality", "")
    measured = [line for test in tests for line in _measured(test)]
    yield from measured or ["No finished test of this experiment reads these weights."]
    yield from ("", "## Cost", "", *_costs(done, tests), "")
    of_items = getattr(build.locate(module["_target_"]), "scores_new_items", None)
    items = [] if of_items is None else [_ITEMS[of_items]]
    yield from ("## Limits", "", *(f"- {line}" for line in (*notes, *items, *_LIMITS)))


def _measured(test: PlannedStage) -> Iterator[str]:
    """A table of one test: means with 95 % intervals."""
    assert test.folder is not None
    found = read_json(test.folder / "metrics.json") or {}
    for row, values in (found.get("rows") or {}).items():
        yield from (f"Test `{row}`, protocol fingerprint `{found.get('fingerprint')}`:", "")
        yield from ("| group | metric | mean | 95 % interval |", "|---|---|---|---|")
        for name, told in values.items():
            group, _, metric = name.partition("/")
            if metric not in METRICS or told["value"] is None:
                continue
            ends = of_metric(values, name)
            span = f"{max(0.0, ends.low):.4f} to {min(1.0, ends.high):.4f}" if ends else "-"
            yield f"| {group} | {metric} | {told['value']:.4f} | {span} |"
        protocol = found.get("protocol") or {}
        plain = {k: v for k, v in protocol.items() if isinstance(v, (str, int, float, bool))}
        yield from ("", "Protocol: " + "; ".join(f"{k} = {v}" for k, v in plain.items()), "")


def _costs(done: Mapping[str, Any], tests: Sequence[PlannedStage]) -> Iterator[str]:
    yield (
        f"Training: {done.get('seconds', 0):,.0f} s on {done.get('devices', 1)} x {done.get('device')}, at "
        f"most {(done.get('peak_memory_mb') or {}).get('host', 0):,} MiB of memory."
    )
    for test in tests:
        assert test.folder is not None
        for scores in sorted(test.folder.glob("scores.*.parquet")):
            cells = cost_of(scores, shared=len(test.spec["modules"]) > 1).cells
            told = ", ".join(f"{k} {v:.4g}" for k, v in cells.items() if v is not None)
            yield f"With all stages behind it, test `{test.name}`: {told}."


def _without_places(overrides: Sequence[str]) -> list[str]:
    """Settings without the user's folders."""
    return [o for o in overrides if "/" not in o.partition("=")[2]]
