"""The table of one comparison, its ratios, and what limits our step, from what the sides reported."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.sequential_measure import common_quality, seconds_to

OURS, SHIPPED = "ours", "ours, as shipped"
TARGETS = {"quality": 5.0, "evaluation": 3.0}  # times faster than the fastest peer
UNEQUAL = 1.25  # ratio of the machine's speed before two sides above which a reader is warned


def summary(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Side -> medians over its turns; None where a figure is missing."""
    sides: dict[str, list[dict[str, Any]]] = found["sides"]
    traces = [r["trace"] for results in sides.values() for r in results if r["trace"]]
    quality = common_quality(traces)
    told: dict[str, dict[str, float | None]] = {}
    for side, results in sides.items():
        reached = [seconds_to(r["trace"], quality) for r in results]
        times = [s for s in reached if s is not None]
        told[side] = {
            "epoch": median(median(r["epoch_seconds"]) for r in results),
            "quality": median(times) if len(times) == len(results) else None,
            "evaluation": median(r["evaluation"] for r in results),
            "test": median(r["test_ndcg"] for r in results) if results[0]["trace"] else None,
            "memory": max(r["peak"] for r in results),
        }
    found["quality"] = quality
    return told


def verdicts(told: dict[str, dict[str, float | None]]) -> Iterator[str]:
    """How many times faster ours is than the fastest peer, against the targets."""
    mine = [side for side in told if side in (OURS, SHIPPED)]
    names = {"epoch": "an epoch", "quality": "to the common quality", "evaluation": "evaluation"}
    for figure, what in names.items():
        times = {s: row[figure] for s, row in told.items() if s not in mine}
        known = {side: seconds for side, seconds in times.items() if seconds is not None}
        if not known:
            continue
        peer = min(known, key=known.__getitem__)
        for side in mine:
            seconds = told[side][figure]
            if seconds is None or (figure == "epoch" and side == SHIPPED):
                continue  # other settings: an epoch is not the same work
            ratio = known[peer] / seconds
            target = TARGETS.get(figure)
            verdict = (
                f" (target {target:g}: {'met' if ratio >= target else 'missed'})" if target else ""
            )
            yield f"{what}: {peer} / {side} = {ratio:.1f}{verdict}"


def cell(value: float | None, base: float | None, digits: int, factor: bool = True) -> str:
    """A figure, with how many times ours it is."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return f"{text} ({value / base:.1f}x)" if factor and base else text


def print_comparison(console: Console, found: dict[str, Any]) -> None:
    """The table of one data set, the ratios, and what limits us."""
    told = summary(found)
    base, sides = told[OURS], found["sides"]
    settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items())
    quality = found["quality"]
    table = Table(title=f"{found['data']}: {settings}, {found['epochs']} epochs")
    for title in ("system", "s / epoch", f"s to NDCG@10 {quality:.4f}", "evaluation s",
                  "test NDCG@10", "peak GiB", "free GFLOP/s"):  # fmt: skip
        table.add_column(title, justify="left" if title == "system" else "right")
    for side, row in told.items():
        first = sides[side][0]
        marks = " (extrapolated epoch)" * ("steps" in first) + " (cached)" * ("cached" in first)
        free = min(r["gflops"] for r in sides[side])
        table.add_row(
            side + marks, cell(row["epoch"], base["epoch"], 3),
            cell(row["quality"], base["quality"], 2), cell(row["evaluation"], base["evaluation"], 3),
            cell(row["test"], None, 4), cell(row["memory"], base["memory"], 2), f"{free:.0f}",
        )  # fmt: skip
    console.print(table)
    for line in verdicts(told):
        console.print(f"  {line}", highlight=False)
    free = [r["gflops"] for results in sides.values() for r in results]
    if max(free) > UNEQUAL * min(free):
        console.print(
            f"  [red]the machine was not equally free (torch.mm gave {min(free):.0f} to "
            f"{max(free):.0f} GFLOP/s before the sides began): these ratios mean little[/red]"
        )
    print_profile(console, sides[OURS][-1]["profile"])


def print_profile(console: Console, profile: dict[str, Any]) -> None:
    """Shares of the machine's peaks, and of the time."""
    console.print(
        f"  our step: {1000 * profile['step_seconds']:.1f} ms, {profile['step_gflop']:.2f} GFLOP, "
        f"{profile['loss_share_of_flop']:.0%} of them in the loss's matrix products",
        highlight=False,
    )
    for what, rate in profile["rates"].items():
        console.print(
            f"    {what}: {rate['speed']:.1f} of {rate['peak']:.1f} {rate['unit']}, "
            f"{rate['speed'] / rate['peak']:.0%} of the measured peak",
            highlight=False,
        )
    shares = ", ".join(f"{what} {share:.0%}" for what, share in profile["parts"].items())
    console.print(
        f"  time under the profiler ({profile['slowdown']:.2f}x): {shares}", highlight=False
    )
