"""What the project's own code says of itself without being imported: dependencies and arguments.

Planning and overriding must answer at once, so neither may import torch; files are read as syntax trees.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from datamodules.versioning import code_digest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("datamodules", "lightning_modules", "callbacks", "experiments")
# What only shows a stage's results, or answers with them: it makes none, so that its changes make none stale.
SHOWS = ("experiments/tracking.py", "experiments/loaded.py")
_OURS = rf"(?:{'|'.join(PACKAGES)})[\w.]*"
_IMPORT = re.compile(
    rf"^[ \t]*(?:from|import)[ \t]+({_OURS})(?:[ \t]+import[ \t]+(\([^)]*\)|[^\n]+))?", re.M
)


def sources(roots: tuple[str, ...]) -> dict[str, str]:
    """Digest of each of our files that these dotted names reach by imports, by path in the project."""
    return {str(f.relative_to(REPO)): _digest(f) for f in source_files(roots)}


def source_files(roots: tuple[str, ...]) -> list[Path]:
    """The project's files that these dotted names reach by imports."""
    todo = [f for root in roots if (f := _module_file(root))]
    found: set[Path] = set()
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += _imports(file)
    return sorted(found)


def changed_sources(recorded: dict[str, str], now: dict[str, str]) -> list[str]:
    """Files that were changed, added or removed since a stage ran."""
    return sorted(f for f in recorded.keys() | now.keys() if recorded.get(f) != now.get(f))


def some_of(files: Sequence[str], most: int = 4) -> str:
    """Names for one line: what computes goes before what only runs it."""
    ordered = sorted(files, key=lambda file: (not file.startswith("lightning_modules"), file))
    rest = len(ordered) - most
    return ", ".join(ordered[:most] + ([f"{rest} more"] if rest > 0 else []))


def changed_since(recorded: dict[str, str]) -> list[str]:
    """Which of the recorded files are now different or gone."""
    return [f for f, d in recorded.items() if not (REPO / f).is_file() or _digest(REPO / f) != d]


@cache
def parameters(target: str) -> tuple[str, ...] | None:
    """Constructor arguments of one of our classes; None for what is not ours or not a class."""
    file = _module_file(target)
    name = target.rpartition(".")[2]
    for node in _tree(file).body if file else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return tuple(_arguments(node, target.rpartition(".")[0]))
        if isinstance(node, ast.ImportFrom) and name in (a.asname or a.name for a in node.names):
            original = next(a.name for a in node.names if name in (a.asname or a.name,))
            return parameters(f"{node.module}.{original}")
    return None


def _arguments(node: ast.ClassDef, module: str) -> Iterator[str]:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            spec = part.args
            yield from (a.arg for a in (*spec.args, *spec.kwonlyargs) if a.arg != "self")
            if spec.kwarg:  # **options are those of the base class
                yield from _inherited(node, module)
            return
    fields = [
        p.target.id
        for p in node.body
        if isinstance(p, ast.AnnAssign) and isinstance(p.target, ast.Name)
    ]
    decorated = any("dataclass" in ast.dump(d) for d in node.decorator_list)
    yield from fields if decorated else _inherited(node, module)


def _inherited(node: ast.ClassDef, module: str) -> Iterator[str]:
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from parameters(f"{module}.{base.id}") or ()


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _digest(file: Path) -> str:
    return code_digest([file])


@cache
def _imports(file: Path) -> tuple[Path, ...]:
    """Our files that a file imports, read off its lines (a syntax tree would take twenty times longer)."""
    names: list[str] = []
    for module, imported in _IMPORT.findall(file.read_text(encoding="utf-8")):
        names += [module, *(f"{module}.{name}" for name in re.findall(r"\w+", imported))]
    files = (_module_file(n) for n in names)
    shown = {REPO / name for name in SHOWS}
    return tuple(dict.fromkeys(f for f in files if f and f not in shown))


def _module_file(dotted: str) -> Path | None:
    parts = dotted.split(".")
    if parts[0] not in PACKAGES:
        return None
    for end in range(len(parts), 0, -1):
        base = REPO.joinpath(*parts[:end])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None
