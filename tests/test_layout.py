"""Who may import whom, where a name may be used, and what the tree looks like: the design as a table."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
OURS = ("datamodules", "lightning_modules", "callbacks", "experiments")
FILES = sorted(
    f.relative_to(REPO).as_posix() for package in OURS for f in (REPO / package).rglob("*.py")
)
TESTS = sorted(f.relative_to(REPO).as_posix() for f in (REPO / "tests").rglob("*.py"))

# package -> what of ours it may import
MAY_IMPORT = {
    "datamodules": ("datamodules",),
    "lightning_modules": (
        "lightning_modules",
        "datamodules.types",
        "datamodules.sources",
        "datamodules.samplers",
        "datamodules.written",
    ),
    "callbacks": ("callbacks",),
    "experiments": OURS,
}
# module -> the only places that may import it
ONLY_IN = {
    "hydra": ("experiments/",),
    "omegaconf": ("experiments/",),
    "wandb": ("callbacks/", "experiments/"), "wandb_workspaces": ("experiments/dashboard.py",),
    "peft": ("lightning_modules/llm/adapters.py",),
    "bitsandbytes": ("lightning_modules/llm/precision.py",),
    "fastapi": ("experiments/service.py", "experiments/serve.py"),
    "uvicorn": ("experiments/service_connections.py", "experiments/serve.py"),
    "gradio": ("experiments/demo_page.py",),
    "vllm": ("lightning_modules/llm/vllm_engine.py",),
    "tests": (),
    "pickle": (), "cPickle": (), "dill": (), "cloudpickle": (), "joblib": (), "shelve": (), "marshal": (),
}  # fmt: skip
PRETRAINED = ("lightning_modules/llm/backbones.py", "lightning_modules/llm/adapters.py")
PLANNING = (
    "run", "config", "artifacts", "lock", "report", "results", "seeds", "significance", "compare",
    "beyond_columns", "plots", "slurm", "sweep", "page", "dashboard", "demo", "paper_table",
)  # fmt: skip
TOP = {
    "pyproject.toml", "Makefile", "README.md", *OURS, "tests", "LICENSE", "CHANGELOG.md",
    "constraints.txt",
}  # fmt: skip


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((REPO / name).read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Dotted names, ``from a import b`` as a.b; relative imports with their package."""
    package = name.split("/")[:-1]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{a.name}" for a in node.names)


def within(dotted: str, roots: tuple[str, ...]) -> bool:
    return any(dotted == r or dotted.startswith(f"{r}.") for r in roots)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_its_package_may(name: str) -> None:
    allowed = MAY_IMPORT[name.partition("/")[0]]
    bad = [i for i in imports(name) if within(i, (*OURS, "tests")) and not within(i, allowed)]
    assert bad == []


@pytest.mark.parametrize("name", FILES)
def test_a_third_party_is_imported_only_where_it_belongs(name: str) -> None:
    for dotted in imports(name):
        places = ONLY_IN.get(dotted.partition(".")[0])
        assert places is None or name.startswith(places or ("nowhere",)), dotted


@pytest.mark.parametrize("name", FILES)
def test_calls_that_belong_to_one_place_or_to_none(name: str) -> None:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
            assert name in PRETRAINED, f"line {node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load":
            assert given.get("weights_only") == "True", f"line {node.lineno}: torch.load unpickles"
        assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        assert called not in ("eval", "exec", "os.system"), f"line {node.lineno}"
        assert given.get("shell") != "True", f"line {node.lineno}"


@pytest.mark.parametrize("name", [*FILES, *TESTS])
def test_every_supported_python_compiles_it(name: str) -> None:
    """Before 3.11 a comprehension that awaits may not stand in another, which no parser tells."""
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for outer in (node for node in ast.walk(tree(name)) if isinstance(node, kinds)):
        for inner in (node for node in ast.walk(outer) if node is not outer):
            if isinstance(inner, kinds):
                waits = any(isinstance(node, ast.Await) for node in ast.walk(inner))
                loops = any(g.is_async for g in inner.generators)
                assert [waits, loops] == [False, False], f"line {inner.lineno}"


def test_a_plan_needs_neither_torch_nor_lightning() -> None:
    modules = ", ".join(f"experiments.{m}" for m in PLANNING)
    banned = ("torch", "lightning", "transformers", "pandas", "wandb", "hydra.utils")
    code = f"import sys, {modules}; print([m for m in {banned} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded - {"hydra.utils"}, loaded  # hydra's compose API imports hydra.utils itself


def test_parsing_data_needs_no_torch() -> None:
    names = ("types", "sources", "filters", "splits", "groups", "candidates", "movielens_formats")
    code = (
        f"import sys, {', '.join(f'datamodules.{n}' for n in names)}; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def tracked() -> list[str]:
    """Files in git's index, or all files where there is no git."""
    try:
        out = subprocess.run(
            ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
        )
        return [n for n in out.stdout.splitlines() if (REPO / n).is_file()]
    except (OSError, subprocess.CalledProcessError):
        return [*FILES, *TESTS, *(n for n in TOP if (REPO / n).is_file())]


def test_the_top_level_is_fixed() -> None:
    top = {name.partition("/")[0] for name in tracked()}
    assert {n for n in top if not n.startswith(".")} <= TOP
    assert top >= {"pyproject.toml", "Makefile", "README.md", *OURS, "tests"}


@pytest.mark.parametrize("name", [*FILES, *TESTS])
def test_a_file_is_named_for_what_it_does_and_short(name: str) -> None:
    assert Path(name).stem not in ("utils", "util", "common", "helpers", "helper", "misc")
    lines = len((REPO / name).read_text(encoding="utf-8").splitlines())
    assert lines <= (340 if name in FILES else 520), lines


# Assembled, so that this file does not name what it forbids.
MACHINE = [rf"(?<![\w./~{{}}-])/{place}/" for place in ("work", "root", "home", "Users", "mnt")]
HOSTS = [
    r"py" + r"pi\.org",
    r"pythonhosted",
    r"index-url",
    r"artifactory",
    r"npmjs",
    r"proxy\.golang",
]


def test_no_file_names_a_registry_or_a_machine() -> None:
    found = []
    for name in tracked():
        try:
            text = (REPO / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if (
                any(re.search(p, line) for p in (*MACHINE, *HOSTS))
                and name != "tests/test_layout.py"
            ):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []


def test_every_package_is_shipped() -> None:
    """A folder without Python's ``__init__`` would be missing from an installed wheel."""
    for name in FILES:
        assert (REPO / name).with_name("__init__.py").is_file(), name
