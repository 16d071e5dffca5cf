"""What is printed cannot steer the terminal; what a program reads stays as it is."""

from __future__ import annotations

import pytest

from experiments.messages import harmless, put, put_exactly, say
from experiments.report import print_table

RED = "\x1b[31mRED"


@pytest.mark.parametrize(
    ("text", "shown"),
    [(RED, r"\x1b[31mRED"), ("bell\a, back\b, \x7f, \x9b1m", r"bell\x07, back\x08, \x7f, \x9b1m"),
     ("over\rwritten", r"over\rwritten"), ("half \ud800", r"half \ud800"),
     ("\u202eevil\u202c \u2066x\u2069", r"\u202eevil\u202c \u2066x\u2069"),
     *[(text, text) for text in ("two\nlines\tof été", "日本", "👨\u200d👩", "שלום\u200f")]],
)  # fmt: skip
def test_what_steers_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_lines_and_tables_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    put(f"has 7: {RED}")
    say(f"error: {RED}")
    print_table(RED, ["", "title"], [["1", RED], ["2", "\ud800[bold]x[/bold]"]])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert err == "error: \\x1b[31mRED\n"
    first, title, *lines = out.splitlines()
    assert first == r"has 7: \x1b[31mRED"
    assert title.strip() == r"\x1b[31mRED"
    cells = [line.split("│")[2].strip() for line in lines if line.startswith("│")]
    assert cells == [r"\x1b[31mRED", r"\ud800[bold]x[/bold]"]


def test_what_a_program_reads_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    put_exactly('{"title": "\x9b\u202e"}')
    assert capsys.readouterr().out == '{"title": "\x9b\u202e"}\n'
