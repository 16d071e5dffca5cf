"""User summaries in waves against one user after the other, in one run on the same model.

``python -m tests.benchmarks.bench_user_summaries [--llm smollm2_135m | tiny] [--users N] [--mode sliding]``.
Histories of 4 to 9 events of made-up films, one for each user, so that nothing is shared between rows. Both
sides ask the same prompts of the same module, in float32 and with the same threads:

* in waves: all users' k-th blocks are batches of at most ``--batch``;
* one by one: each user's blocks one after the other, a prompt at a time, as MLLM-MSR's released code does
  (preferece_inference_recurrent.py: a chain for each user).

Both sides warm up on a user that is not counted. Texts of the sides are compared: in float32 padding moves
the last bits, so that few or none differ.

Cost, by arithmetic: a step of P prompt tokens and G written tokens takes 2 W (P + G) FLOPs with W weights,
in either way. One by one, a written token reads all weights for one row, in a batch of B rows for all of
them, so that waves gain where memory is what limits writing (a GPU, a large model), and little on prompts,
whose tokens share a read of the weights in any case.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from datamodules.types import Histories, ItemWords, Rows
from experiments import build, config
from lightning_modules.llm import BackboneSpec
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.user_summaries import UserSummariesModule

WORDS = ItemWords("film", "films", "watch", "watched")
FIRST = ("The Last", "A Quiet", "Return to the", "Beyond the", "My Own", "Night of the", "Winter's")
SECOND = (
    "Harbour",
    "Detective",
    "Garden",
    "Machine",
    "Witness",
    "Orchestra",
    "Frontier",
    "Masquerade",
)
ABOUT = (
    "a slow drama about a family that comes apart",
    "a tense thriller in which nobody tells the truth",
    "a light comedy of two people who keep missing each other",
    "science fiction with large ships and small hopes",
)


def catalogue() -> pl.DataFrame:
    """56 films with a line on each."""
    titles = [f"{a} {b}" for a in FIRST for b in SECOND]
    return pl.DataFrame({
        "title": titles, "summary": [f"It is {ABOUT[i % len(ABOUT)]}." for i in range(len(titles))]
    })  # fmt: skip


def rows_of(users: int, seed: int = 0) -> Rows:
    """A history of 4 to 9 events of each user."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(4, 10, users)
    offsets = np.concatenate([[0, 0], np.cumsum(counts)]).astype(np.int64)
    items = np.concatenate([draw.permutation(56)[:n] + 1 for n in counts]).astype(np.int32)
    none = np.zeros(len(items), np.int64)
    histories = Histories(offsets, items, none.astype(np.int8), none, 56)
    user = np.arange(1, users + 1)
    return Rows(histories, user - 1, user, offsets[user], offsets[user + 1], 0, 0)


def spec(name: str, folder: Path) -> BackboneSpec:
    """A file of experiments/llm, or a tiny model of random weights; in float32."""
    if name == "tiny":
        RandomModel().write(folder)
        return BackboneSpec(str(folder), dtype="float32", max_length=4096)
    node = config.load("a_llmrec/movielens_100k", [f"llm={name}"]).config["llm"]
    found: BackboneSpec = build.build(node)
    return replace(found, dtype="float32")


def seconds(work: Callable[[], None]) -> float:
    """How long it took."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Sides:
    """Two modules on one language model, each with generations of its own."""

    def __init__(self, arguments: argparse.Namespace, llm: BackboneSpec) -> None:
        self.arguments, self.llm = arguments, llm
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.first = self.module(1, seed=1)
        self.first._load(llm, self.device, None, seed=0)

    def module(self, users: int, seed: int = 0) -> Any:
        """A module that has written nothing."""
        made: Any = UserSummariesModule(
            catalogue(), WORDS, {"test": rows_of(users, seed)}, self.llm, mode=self.arguments.mode,
            fields=["title", "summary"], splits=["test"], max_new_tokens=self.arguments.new_tokens,
        )  # fmt: skip
        if hasattr(self, "first"):
            made.model = self.first.model
        return made

    def in_waves(self, module: Any) -> int:
        """Calls of the language model."""
        batches = module.predict_batches(self.arguments.batch, 0, 1)
        for batch in batches:
            module.predict_step(torch.tensor(batch))
        return len(batches)

    def one_by_one(self, module: Any) -> int:
        """The same, each user's steps in turn."""
        for chain in module.plan.chains:
            for number in chain:
                module.predict_step(torch.tensor([number]))
        return sum(map(len, module.plan.chains))


def main() -> None:
    """Measure both sides, and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--llm", default="smollm2_135m", help="a file of experiments/llm, or tiny")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="prompts of a batch, at most")
    parser.add_argument("--new-tokens", type=int, default=48, help="of a text, at most")
    parser.add_argument("--mode", default="recurrent", choices=("recurrent", "direct", "sliding"))
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(arguments, spec(arguments.llm, Path(folder)))
        measure(arguments, sides)


def measure(arguments: argparse.Namespace, sides: Sides) -> None:
    """Both sides on the same users."""
    sides.one_by_one(sides.first)  # warms up
    waves, alone = sides.module(arguments.users), sides.module(arguments.users)
    found: dict[str, tuple[int, float]] = {}
    for name, run, module in (
        ("in waves", sides.in_waves, waves), ("one by one", sides.one_by_one, alone)
    ):  # fmt: skip
        calls: list[int] = []
        spent = seconds(lambda run=run, module=module, calls=calls: calls.append(run(module)))
        found[name] = calls[0], spent
    texts = waves.numbered
    prompts = [len(waves.prompt(number)) for number in range(texts)]
    written = [len(tokens) for tokens in waves.generations.known.values()]
    table = Table(
        title=f"{arguments.llm} in float32 on {sides.device}, {torch.get_num_threads()} threads: "
        f"{arguments.users} users, {texts} texts ({waves.plan.waves} waves), prompts of "
        f"{np.mean(prompts):.0f} tokens, {np.mean(written):.0f} written"
    )
    for column in ("what", "calls", "seconds", "texts/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, (calls, spent) in found.items():
        table.add_row(name, str(calls), f"{spent:.2f}", f"{texts / spent:.2f}")
    same = sum(waves._texts[number] == alone._texts[number] for number in range(texts))
    console = Console(width=120)
    console.print(table)
    ratio = found["one by one"][1] / found["in waves"][1]
    console.print(f"waves are {ratio:.1f} times as fast; {same} of {texts} texts are equal")


if __name__ == "__main__":
    main()
