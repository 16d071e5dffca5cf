"""``make data`` on the screen: counts, filters, doubts, split and groups of prepared data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from datamodules.versioning import read_json
from experiments.report import open_console, plain

KEPT = "data_report.json"  # in a run folder: what ``manifests`` said


def manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifest of prepared data, and those of its parts."""
    manifest: dict[str, Any] = read_json(folder / "manifest.json") or {}
    parts = (Path(part) for part in manifest.get("parts", {}).values())
    return [manifest, *(m for part in parts for m in manifests(part))] if manifest else []


def lines(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The whole data report as (name, text)."""
    counts = [(name, f"{count:,}") for name, count in manifest["counts"].items()]
    told = (line for section in sections(manifest) for line in section)
    return [*counts, *((str(name), str(text)) for name, text in told)]


def print_data_report(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``make data``: counts, filters, doubts, split, groups; expected counts beside ours.

    Returns:
        The manifest.
    """
    manifest: dict[str, Any] = read_json(folder / "manifest.json")
    for name, part in manifest.get("parts", {}).items():
        print_data_report(Path(part), config.get("parts", {}).get(name, {}))
    counts = manifest["counts"]
    console = open_console()
    table = Table(
        show_header=False,
        title=f"{manifest['recipe']['name']} (content {manifest['digest']})",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("")
    expected = config.get("expected") or {}
    for name, count in counts.items():
        table.add_row(name, f"{count:,}{_against(count, expected.get(name))}")
    for section in sections(manifest):
        table.add_section()
        for name, text in section:
            table.add_row(escape(str(name)), escape(str(text)))
    console.print(table)
    for note in _notes_of(manifest):
        console.print(escape(note), soft_wrap=True)
    console.print(f"source: {escape(manifest['source'])}\nfolder: {escape(str(folder))}")
    return manifest


def group_notes(folders: Iterable[Path]) -> list[str]:
    """What a table of these runs' cold and warm rows must say: where counts could not tell the two apart."""
    kept = (m for folder in dict.fromkeys(folders) for m in read_json(folder / KEPT, list) or [])
    return list(dict.fromkeys(note for manifest in kept for note in _notes_of(manifest)))


def _notes_of(manifest: dict[str, Any]) -> Iterator[str]:
    """A sentence for items and one for users, where ``groups`` found a count that both groups would hold."""
    sizes = (manifest.get("report") or {}).get("groups", {})
    for kind in ("item", "user"):
        events = sizes.get(f"tied_{kind}_events")
        if events is None:
            continue
        alike, every, name = sizes[f"tied_{kind}"], sizes[f"{kind}s"], manifest["recipe"]["name"]
        has = f"{alike:,} of {every:,} {kind}s of {name} have {events:,} training event{'s' * (events != 1)}"
        if alike == every:
            yield f"No {kind} is cold or warm: {has}"
            continue
        whose = {sizes.get(f"{end}_{kind}_min_events"): end for end in ("warm", "cold")}
        told = {
            "cold": "all of these are cold, and those with more are warm",
            "warm": "all of these are warm, and those with fewer are cold",
            None: "these are neither, those with fewer are cold and those with more are warm",
        }[whose.get(events)]
        yield f"{has}, too many for its least and its most trained {kind}s to be told apart: {told}"


def sections(manifest: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    """The data report's blocks of (name, text)."""
    report = manifest.get("report")
    if not report:
        return [_recipe_section(manifest)]
    filters = [
        (f"after {step['description']}", _counts_text(step["after"])) for step in report["filters"]
    ]
    lengths = "  ".join(f"{q}: {n}" for q, n in report["history_length"].items())
    ratings = "  ".join(f"{r}: {n:,}" for r, n in report["ratings"].items()) or "none"
    return [
        [
            ("raw file", _counts_text(report["raw"])),
            *(
                (k if k.startswith("kept:") else f"skipped: {k}", f"{v:,}")
                for k, v in report["skipped"].items()
            ),
            *filters,
        ],
        [
            ("history length (quantiles)", lengths),
            ("ratings", ratings),
            ("repeated user-item pairs", f"{report['repeated_pairs']:,}"),
        ],
        _example_section(report.get("examples", {})),
        [(f"text: {k}", f"{v:,}") for k, v in report["text"].items()],
        _split_section(report["split"], manifest["counts"]["users"]),
        [(k.replace("_", " "), f"{v:,}") for k, v in report["groups"].items()],
        _recipe_section(manifest),
        [(f"sha256 {name}", digest) for name, digest in manifest["checksums"].items()],
    ]


def _recipe_section(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What was done to the rows."""
    return [
        (k, v if isinstance(v, str) else "; ".join(_flat(v)) or "none")
        for k, v in manifest["recipe"].items()
    ]


def _flat(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{k}: {', '.join(_flat(v))}" for k, v in value.items()]
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _example_section(parts: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Labelled examples by purpose."""
    return [
        (f"{code} examples", ", ".join(f"{plain(v)} {k}" for k, v in counts.items()))
        for code, counts in parts.items()
    ]


def _split_section(split: dict[str, Any], users: int) -> list[tuple[str, str]]:
    """Events by purpose, what is new in them, and what time says about leakage."""
    names = {"cold_users": "users never trained on", "cold_items": "items never trained on"}
    names |= {"no_history": "without any history"}
    parts = [
        (code, ", ".join(f"{n:,} {names.get(k, k)}" for k, n in counts.items()))
        for code, counts in split.items()
        if isinstance(counts, dict) and counts["events"]
    ]
    held_out = split["test"]["users"]
    parts.append(("users without a test event", f"{users - held_out:,}"))
    times = {
        "leakage": "test targets older than the newest training event",
        "tied_last_two_users": "users whose last two events share a time",
        "tied_last_two_share": "the same, as a share",
        "tied_events_share": "events that share a time with another of their user",
    }
    told = [(text, plain(split[k])) for k, text in times.items() if split[k] is not None]
    return [*parts, *(told or [("leakage and ties", "not known: the data has no times")])]


def _against(count: int, expected: int | None) -> str:
    if expected is None:
        return ""
    if count == expected:
        return " (as expected)"
    return f" [red](expected {expected:,}: {count - expected:+,})[/red]"


def _counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{v:,} {k}" for k, v in counts.items())
