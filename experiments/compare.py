"""The command behind ``make compare`` and ``make beyond``: finished experiments in one table.

``python -m experiments.compare [beyond] [NAME[:STAGE] [key=value ...] ...]``; ``beyond`` tells what their
lists are like besides right. Variables: NAMES (the same words), ARGS (overrides of them all), SEEDS, BASELINE
(a row of the table; without it the strongest row without a model), K (the cutoff of ``beyond``), ENCODER (of
its titles, see ``title_vectors``), FORMAT (markdown, latex or csv), OUT (a file to write as well). It reads
run folders alone, and ``beyond`` the prepared data: nothing is trained, and torch is imported by the process
alone that ``beyond`` starts for sentence embeddings.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import artifacts, compared, costs, seeds
from experiments.baseline import strength
from experiments.compared import Tests, head, title_of, value_of
from experiments.data_report import group_notes
from experiments.errors import UserError
from experiments.intervals import ALIKE, CHANCE
from experiments.keys import nearest
from experiments.messages import print_error, put, say
from experiments.results import COLUMNS, LABELLED_COLUMNS, Row
from experiments.table_text import BETTER, FORMATS, LEVEL, WORSE, Line, Sheet

BEYOND = "beyond"


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen)."""
    try:
        form, words = _format(), list(argv)
        beyond = words[:1] == [BEYOND]
        rows = compared.find(compared.request(words[beyond:]), _seeds(), artifacts.runs_root())
        if beyond:
            from experiments.beyond_columns import sheet_of  # reads prepared data and scores

            sheet = sheet_of(rows)
        else:
            sheet = accuracy(rows, os.environ.get("BASELINE", "").strip())
        text = sheet.told(form)
        if form == "csv":  # whose text has no place for remarks
            for remark in sheet.remarks:
                say(remark)
        put(text.rstrip("\n"))
        _write(text)
    except UserError as error:
        print_error(error)
        return 2
    except BrokenPipeError:
        sys.stdout = None
    except KeyboardInterrupt:
        return 130
    return 0


def _format() -> str:
    given = os.environ.get("FORMAT", "").strip() or FORMATS[0]
    if given not in FORMATS:
        raise UserError(
            f"FORMAT={given!r}, expected one of {', '.join(FORMATS)}{nearest(given, FORMATS)}"
        )
    return given


def _seeds() -> tuple[int, ...]:
    """Those of SEEDS; none where it is not set, which stands for all that were run."""
    return seeds.requested([]) if os.environ.get("SEEDS", "").strip() else ()


def _write(text: str) -> None:
    given = os.environ.get("OUT", "").strip()
    if not given:
        return
    target = Path(given).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"OUT={given} cannot be written: {error.strerror or error}") from error
    say(f"wrote {given}")


def accuracy(rows: Sequence[Row], named: str) -> Sheet:
    """Quality of all, cold and warm rows with intervals, marks against the baseline, and costs.

    Args:
        rows: methods first, then rows without a model, of one protocol.
        named: BASELINE; empty for the strongest row without a model.

    Raises:
        UserError: the baseline is no row, or scores files are missing or hold other rows.
    """
    base = compared.chosen_baseline(rows, named) or max(
        (r for r in rows if r.reference), key=strength, default=None
    )
    tests = significance_of(rows, base)
    metrics = LABELLED_COLUMNS if rows[0].labelled else ("all/hit@1", *COLUMNS)
    lines = [
        Line(
            row.label + (" *" if row.older else ""),
            {
                "seeds": row.seed_count,
                **{head(m): value_of(row, m, tests) for m in metrics},
                **costs.cost_cells(row.scores, row.reference),
            },
            row.reference,
        )
        for row in rows
    ]
    told = [
        c
        for c in ("seeds", *map(head, metrics), *costs.COLUMNS)
        if any(str(line.cells[c]) != "-" for line in lines)
    ]
    return Sheet(title_of(rows), told, lines, _remarks(rows, base, tests))


def significance_of(rows: Sequence[Row], base: Row | None) -> Tests:
    """The paired test of each row against the baseline, Holm's correction for all of them.

    Raises:
        UserError: a scores file is missing, or two hold different rows.
    """
    if base is None:
        return {}
    from experiments import significance  # scipy is slow to import

    found = []
    for row in rows:
        if row is base:
            continue
        if gone := [f for f in (*row.scores, *base.scores) if not f.is_file()]:
            raise UserError(f"{gone[0]} is missing: delete its folder, and make exp tests anew")
        try:
            found += [(row, c) for c in significance.compare(row.scores, base.scores)]
        except ValueError as error:
            raise UserError(str(error)) from error
    corrected = significance.holm([c.p for _, c in found])
    return {
        (row.scores[0], f"all/{c.metric}"): (p, c.difference)
        for (row, c), p in zip(found, corrected, strict=True)
    }


def _remarks(rows: Sequence[Row], base: Row | None, tests: Tests) -> list[str]:
    """What a reader must know to read the table."""
    several = any(len(r.scores) > 1 for r in rows)
    single = any(len(r.scores) == 1 for r in rows)
    over = "that draws users anew" if rows[0].labelled else "that takes rows as independent"
    spans = [
        *(["over seeds (Student's t)"] if several else []),
        *([over + " where one seed was run" * several] if single else []),
    ]
    told = [f"± is half of the 95 % interval {' or '.join(spans)}, {ALIKE}; {CHANCE} is exact."]
    tested = " and ".join(dict.fromkeys(head(metric) for _, metric in tests))
    if base is not None and tested:
        by = "draws of users" if rows[0].labelled else "Wilcoxon's signed-rank test over users"
        told.append(
            f"{BETTER} better, {WORSE} worse than {base.label} with p < {LEVEL}: paired tests of {tested} by "
            f"{by}, Holm's correction for all of the table."
        )
    told += (f"{note}." for note in group_notes(f.parent for r in rows for f in r.scores))
    told.append(
        "Hours are of all stages of a row's chain (CPU-hours times threads, GPU-hours times devices; of a "
        "resumed stage the last attempt's), memory is the most of any of them; users/s of the test."
    )
    if not any(r.reference for r in rows):
        told.append("No chance and trivial rows of this protocol were run.")
    if any(r.older for r in rows):
        told.append('* made by older code; make exp with ARGS="stale=rerun" makes it anew.')
    return told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
