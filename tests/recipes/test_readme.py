"""The README: each command is executed (``readme_commands`` says how), and what it shows is true.

A command without an entry there, or an entry without a command, fails. The example of a method of one's own
is written down as it stands and run in a copy of the tree; so are the example files of one's own data.
"""

from __future__ import annotations

import ast
import csv
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import check, config
from tests import preloaded
from tests.conftest import REPO
from tests.recipes.readme_commands import BLOCKS, TARGETS, Composed, Elsewhere, Left, Ran

README = (REPO / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("make", "python", "sbatch", "srun", "pip", "curl", "git")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
SNIPPET = "from experiments import load"
PACKAGES = ("datamodules", "lightning_modules", "callbacks", "experiments", "tests")


def blocks(kind: str) -> list[str]:
    return [text for label, text in FENCED.findall(README) if label == kind]


def commands() -> list[str]:
    """Lines of code blocks that start a program, without what is said behind them."""
    whole = (re.sub(r"\\\n\s*", "", text) for text in blocks(""))  # lines that go on
    lines = (line for text in whole for line in text.splitlines())
    found = (line for line in lines if line.partition(" ")[0] in PROGRAMS)
    return list(dict.fromkeys(re.sub(r"\s+# .*|\s{2,}#.*", "", line).strip() for line in found))


def request(command: str) -> tuple[str, dict[str, str]]:
    """Target and variables of a ``make`` command, as a shell reads them."""
    _, target, *rest = shlex.split(command)
    return target, dict(word.split("=", 1) for word in rest)


def recipe(target: str) -> list[str]:
    """The module that the Makefile starts for a target, with its words."""
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}: .*\n\t@\$\(PY\) -m (.+)$", makefile, re.M)
    assert found, f"the Makefile starts no module of ours for {target}"
    return shlex.split(found[1])


def example(start: str) -> str:
    """The block that begins like this."""
    (found,) = [text for _, text in FENCED.findall(README) if text.startswith(start)]
    return str(found)


# ---------------------------------------------------------------- the table


def test_each_command_has_an_entry_and_each_entry_a_command() -> None:
    found = set(commands())
    assert found - set(BLOCKS) == set(), "say in readme_commands.BLOCKS how these are executed"
    assert set(BLOCKS) - found == set(), "these stand in the README no more"
    told = {request(c)[0] for c in found if c.startswith("make ")}
    inline = set(re.findall(r"(?<!`)`make ([a-z-]+)", README)) - told
    assert inline - set(TARGETS) == set(), "say in readme_commands.TARGETS how these are executed"
    assert set(TARGETS) - inline == set(), "these stand in the README no more, or in a block"
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for target in told | inline:
        assert re.search(rf"^{target}:", makefile, re.M), f"the Makefile has no {target}"


@pytest.mark.parametrize(
    "test", sorted({w.test for w in (*BLOCKS.values(), *TARGETS.values()) if isinstance(w, Elsewhere)})
)  # fmt: skip
def test_a_test_that_is_named_exists(test: str) -> None:
    file, name = test.split("::")
    text = (REPO / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.M)


def _settings() -> Iterator[tuple[str, str]]:
    """Experiment and ARGS of each command that has both, or that is run by no test."""
    for command, way in BLOCKS.items():
        if command.startswith("make ") and not isinstance(way, Left):
            variables = request(command)[1]
            known = variables.get("NAME", "") not in ("", "fading/movielens_100k", "mine")
            if known and (variables.get("ARGS") or isinstance(way, Composed)):
                yield variables["NAME"], variables.get("ARGS", "")


@pytest.mark.parametrize(("name", "arguments"), sorted(set(_settings())))
def test_each_setting_composes_and_binds(name: str, arguments: str, tmp_path: Path) -> None:
    """Also of those commands that a test runs with other words: a slip in the README is found."""
    if "slurm=mysite" in arguments or "data=mine" in arguments:
        pytest.skip("a file of the user's")
    for part in ("FOLDER", "TAR", "FILE", "$PWD"):
        arguments = arguments.replace(part, str(tmp_path))
    for file in ("events.csv", "items.csv", "adapter.safetensors"):
        (tmp_path / file).write_text("")
    own = ("data.category=all", "images.")  # of `make prepare` and `make images`
    words = [config.as_text(w) for w in shlex.split(arguments) if not w.startswith(own)]
    experiment = config.load(config.full_name(name), words)
    assert list(check.binding_problems(experiment)) == []


@pytest.mark.parametrize(
    ("command", "way"),
    [
        *((c, w) for c, w in BLOCKS.items() if isinstance(w, Ran)),
        *((f"make {t}", w) for t, w in TARGETS.items() if isinstance(w, Ran)),
    ],
)
def test_a_command_runs_as_the_makefile_starts_it(
    command: str, way: Ran, finished: Any, tiny: list[str], tiny_movielens: Path,
    command_environment: Callable[[Path], dict[str, str]],
) -> None:  # fmt: skip
    target, variables = request(command)
    variables |= way.variables
    words = tiny if way.tiny else [f"data.root={tiny_movielens}"] * bool(way.words)
    if target not in ("list", "slurm"):
        told = shlex.split(variables.get("ARGS", ""))
        variables["ARGS"] = shlex.join([*told, *words, *way.words])
    asked = {**command_environment(finished.runs), **variables}
    done = preloaded.run(*recipe(target), env=asked)
    assert done.returncode == 0, done.stderr[-3000:]
    assert way.says in done.stdout, done.stdout[-3000:]
    if variables.get("NAME") == "sasrec/movielens_100k" and target == "exp":
        assert "running" not in done.stderr  # all of it was there


def test_the_python_lines_recommend(
    finished: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = [text for text in blocks("python") if text.startswith(SNIPPET)]
    call = 'load("sasrec/movielens_100k")'
    assert call in snippet
    given = ", ".join(repr(word) for word in tiny)
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    names: dict[str, Any] = {}
    exec(compile(snippet.replace(call, f"{call[:-1]}, {given})"), "README.md", "exec"), names)
    assert [len(answer.items) for answer in names["lists"]] == [10, 10]
    assert len({item.item for item in names["lists"][0].items}) == 10


# ---------------------------------------------------------------- a method, and data, of one's own


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with what the README tells to write, where it says."""
    scratch = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(REPO / package, scratch / package, ignore=ignored)
    for name in ("pyproject.toml", "Makefile", "README.md", "constraints.txt"):
        shutil.copy(REPO / name, scratch / name)
    for text in blocks("python"):
        if path := re.match(r"# (lightning_modules/\S+)\n", text):
            (scratch / path[1]).parent.mkdir(exist_ok=True)
            (scratch / path[1]).write_text(text.partition("\n")[2])
    (scratch / "experiments" / "fading").mkdir()
    file = scratch / "experiments" / "fading" / "movielens_100k.yaml"
    file.write_text(example_of("yaml", "lightning_modules.fading.FadingModule"))
    return scratch


def example_of(kind: str, having: str) -> str:
    (found,) = [text for text in blocks(kind) if having in text]
    return found


def inside(copy: Path, runs: Path, environment: dict[str, str], *words: str, **more: str) -> Any:
    """A module of the copy."""
    own = {**environment, "PYTHONPATH": str(copy), "LLMREC_RUNS": str(runs), **more}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=copy, env=own, capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_the_method_of_the_walk_runs(
    copy: Path, finished: Any, tiny: list[str], tmp_path: Path,
    command_environment: Callable[[Path], dict[str, str]],
) -> None:  # fmt: skip
    runs = shutil.copytree(
        finished.runs, tmp_path / "runs"
    )  # others look for one run of each stage
    environment = command_environment(runs)
    name, other = "fading/movielens_100k", "sasrec/movielens_100k"
    done = inside(copy, runs, environment, "experiments.run", "exp", name, *tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    assert name in done.stdout
    told = [w for w in tiny if not w.startswith("data.root")]
    words = ("experiments.compare", name, *told, other, *told)
    table = inside(copy, runs, environment, *words)
    assert table.returncode == 0, table.stderr[-3000:]
    heads = [line.split()[1] for line in table.stdout.splitlines() if line.startswith("| ")]
    assert heads[1:3] == [name, other]
    # What the walk names. The chain, which test_every_model finds by the file's name, has run above.
    files = ("tests/test_layout.py", "tests/experiments/test_config.py")
    tested = inside(
        copy, runs, environment, "pytest", "-q", "-p", "no:cacheprovider", "-k", "fading", *files
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", tested.stdout)[0]) >= 8


@pytest.mark.slow
def test_a_table_of_ones_own_becomes_data(
    copy: Path, tmp_path: Path, tiny: list[str], command_environment: Callable[[Path], dict[str, str]]
) -> None:  # fmt: skip
    """The example files with more lines of their kind, by the command and by a file of its own."""
    environment = command_environment(tmp_path)
    heads = ("user_id,item_id,rating,timestamp\n", "item_id,title,description,categories,")
    events, items = (list(csv.reader(example(head).splitlines())) for head in heads)
    for user in range(20):  # walks round the shop
        for place in range(8):
            row = [
                f"u{user + 3}",
                f"C{(user + place) % 12:03}",
                "4",
                str(1_400_000_000 + 60 * place),
            ]
            events.append(row)
    for file, rows in (("events.csv", events), ("items.csv", items)):
        with (tmp_path / file).open("w", newline="") as out:
            csv.writer(out).writerows(rows)
    (long,) = [c for c in commands() if "data=custom" in c]
    words = shlex.split(request(long)[1]["ARGS"].replace("$PWD", str(tmp_path)))
    small = [w for w in tiny if not w.startswith("data.")]
    done = inside(
        copy, tmp_path / "runs", environment, "experiments.run", "exp", "sasrec/movielens_100k",
        *words, *small, "~stages.reference",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"sasrec/movielens_100k +│ +20 ", done.stdout), (
        done.stdout
    )  # who have 3 events
    mine = example_of("yaml", "name: mine").replace("~/mine", str(tmp_path))
    (copy / "experiments" / "data" / "mine.yaml").write_text(f"# My shop\n{mine}")
    told = inside(copy, tmp_path / "runs", environment, "experiments.run", "data", "mine")
    assert told.returncode == 0, told.stderr[-3000:]
    assert re.search(r"interactions\D+160\b", told.stdout), (
        told.stdout
    )  # 5-core: the walkers' events


@pytest.mark.slow
def test_a_cell_of_a_papers_table_is_run(
    tiny: list[str], tmp_path: Path, command_environment: Callable[[Path], dict[str, str]]
) -> None:  # fmt: skip
    before = (REPO / "experiments" / "REPRODUCTION.md").read_bytes()
    words = shlex.join([*tiny, "data.candidates.count=20", "~stages.reference"])
    asked = {"PAPER": "sasrec", "SIZE": "cpu", "TABLE": "III", "RUN": "1", "ARGS": words}
    done = preloaded.run(*recipe("table"), env={**command_environment(tmp_path), **asked})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 cells: 2 run, 0 not run, 0 without an experiment" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("│ SASRec")]
    cells = [re.split(r" *│ *", line.strip("│ \n"))[2:] for line in lines]
    for (known, ours, apart, rows, seeds, _), paper in zip(
        cells, ("0.8245", "0.5905"), strict=True
    ):
        assert (known, rows, seeds) == (paper, "60", "1")
        assert float(apart) == pytest.approx(float(ours.split()[0]) - float(paper), abs=2e-4)
    assert (
        REPO / "experiments" / "REPRODUCTION.md"
    ).read_bytes() == before  # overrides write nothing


# ---------------------------------------------------------------- troubleshooting


def _sentences() -> list[str]:
    """Parts of strings in our code, as written between what is filled in."""
    found = []
    for package in PACKAGES[:-1]:
        for file in (REPO / package).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
            found += [s for s in strings if isinstance(s, str)]
    return found


def test_messages_of_the_troubleshooting_table_are_the_codes_own() -> None:
    table = README.partition("## Troubleshooting")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(told) >= 10
    sentences = _sentences()
    for message in told:
        piece = message.removesuffix("...").strip()
        assert any(piece in s for s in sentences), message
