"""A-LLMRec's second stage against the ways of its authors' code, side by side in one run.

``python -m tests.benchmarks.bench_a_llmrec [--llm smollm2_135m | gemma3_270m | tiny] [--steps N]``. Prompts
list 10 films and 20 candidates (made-up titles, as long as MovieLens'); weights of the two stages are random.
All sides run on one language model, batch and number of threads, in float32; users' and items' vectors are
computed before.

* a step: ours, as a whole batch and a row at a time (``launch.micro_batch_size=1``), and theirs: vectors put
  into the prompts one by one, logits of the whole vocabulary at every position, of which few count. Loss and
  gradients are first asserted to be equal to 1e-4. One thing of theirs is left out: they take the mean over
  all answer tokens, we that of each row's mean;
* sentence encoding: a step of the first stage with texts encoded each time (trained, or frozen), or kept;
* evaluation: their greedy generation with a repetition penalty of 1.5, as far as the model goes, to all of
  its 512 tokens, and to as many as the longest target has, against the likelihoods of all candidates' titles;
* growth: seconds of our step and evaluation by history, candidates and users; the arithmetic of other models.

Times are medians of ``--steps`` rounds in alternating order, after one that warms up. Memory is that of a
process a side: the largest resident set (Linux) or what the GPU had allocated at most, in all, and beyond
what was there before the step (the weights, Python, torch).

Cost. A prompt has about 70 + 15 (history + candidates) tokens here, and scoring reads 12 more for each
candidate; work is linear in them (attention's own products, which grow with the square, are some percent),
and linear in users; the number of items has no part in it. With P weights a token costs 2 P FLOPs forward,
and 2 P backward: gradients pass through frozen weights, which need none of their own. The head's V H weights
are part of P at all positions in their code, and at the answer's alone in ours: ours needs P / (P + V H) of
their arithmetic, and little more can be won there: the user's soft token is the 25th, everything behind it
moves with the projectors. Rows one by one have no padding and no mask, so that attention skips what is not
seen.

Movies_and_TV (297,498 users, 59,944 items), OPT-6.7B on one H100, by arithmetic alone: P = 6.44e9 without
embedding and head; prompts of 700 tokens; 989e12 FLOP/s in bfloat16, of which we assume 40 %, 3.96e14. A
user's training row: 700 x (4 P + 3 x 1.8e8 of attention) = 1.84e13 FLOPs, 0.047 s; an epoch of all users 3.8
hours, the paper's five 19.2 hours. Scoring a user: 920 tokens x (2 P + 2.4e8) + 221 x 2 x 2.06e8 of the head
= 1.22e13 FLOPs, 0.031 s: 5 minutes for the authors' 10,000 users, 2.5 hours for all. Their generation at
batch 4 reads 13.3 GB of weights a token: at 3.35e12 bytes/s and again 40 %, 10 ms, so 512 tokens take 5.1 s,
1.3 s a user with the prompt: 3.6 hours for 10,000 users, 42 times ours. A title of 15 tokens takes 0.06 s a
user: scoring is then 2 times as fast.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from experiments import build, config
from lightning_modules.a_llmrec.prompts import USER
from lightning_modules.llm import BackboneSpec, SentenceEncoderSpec
from lightning_modules.llm.label_scoring import NO_LOSS
from tests.benchmarks.a_llmrec_world import CANDIDATES, SHOWN, Parts, World, gradients
from tests.lightning_modules.tiny_bert import write_tiny_bert
from tests.lightning_modules.tiny_llm import write_tiny_llm

WRITTEN = 512  # tokens that the authors' code lets a model write
PENALTY = 1.5
SIDES = ("theirs", "ours", "ours, row by row")
# (weights that every token passes, vocabulary, width): what the arithmetic needs of models not at hand.
OTHERS = {
    "OPT-6.7B": (32 * 12 * 4096**2, 50_272, 4096),
    "Llama 3.1 8B": (6_979_321_856, 128_256, 4096),
}


class Prompts(NamedTuple):
    """A batch as the authors' code has it: answers behind prompts, then padding."""

    tokens: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    labels: Tensor  # (B, L) -100 = no loss
    slots: list[list[int]]  # (B) of L: 0, USER or an item


def padded(module: Any, batch: Any) -> Prompts:
    """Our batch, padded their way."""
    pad, rows = module.tokenizer.pad_token_id, len(batch.row)
    real = batch.token_mask.bool()
    length = int(real.sum(1).max()) + 1  # our prompts leave an answer's last token out
    tokens = batch.tokens.new_full((rows, length), pad)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, NO_LOSS)
    slots = []
    for b in range(rows):
        ids, answer = batch.tokens[b][real[b]], batch.answers[b][batch.answers[b] != NO_LOSS]
        end = len(ids) + 1
        tokens[b, : end - 1], tokens[b, end - 1], mask[b, :end] = ids, answer[-1], 1
        labels[b, end - len(answer) : end] = answer
        slots.append(batch.slots[b][real[b]].tolist())
    return Prompts(tokens, mask, labels, slots)


def filled(module: Any, tokens: Tensor, slots: list[list[int]], users: Tensor) -> Tensor:
    """Embeddings (B, L, H), into which vectors are written one at a time."""
    embeddings: Tensor = module.model.get_input_embeddings()(tokens)
    for b, row in enumerate(slots):
        user = module.user_projector(users[b : b + 1])[0]
        items = torch.tensor([i for i in row if i > 0], device=tokens.device)
        vectors = iter(module.item_projector(module.item_states()[items]))
        for place, slot in enumerate(row):
            if slot:
                embeddings[b][place] = user if slot == USER else next(vectors)
    return embeddings


def their_loss(module: Any, batch: Any) -> Tensor:
    """Logits of the whole vocabulary at every position, of which those of the answers count."""
    prompts = padded(module, batch)
    users = module.user_states("train")[batch.row]
    embeddings = filled(module, prompts.tokens, prompts.slots, users)
    logits = module.model(
        inputs_embeds=embeddings, attention_mask=prompts.mask, use_cache=False
    ).logits
    said, wanted = logits[:, :-1].contiguous(), prompts.labels[:, 1:].contiguous()
    each = F.cross_entropy(
        said.view(-1, said.shape[-1]), wanted.view(-1), reduction="none", ignore_index=NO_LOSS
    )
    return (each.view_as(wanted).sum(1) / (wanted != NO_LOSS).sum(1)).mean()


def step(module: Any, world: World, rows: int, side: str) -> float:
    """Forward and backward of the first rows; their loss."""
    module.zero_grad()
    device = module.device
    if side == "theirs":
        loss = their_loss(module, world.batch("train", np.arange(rows)).to(device))
        loss.backward()
        return float(loss)
    total, size = 0.0, 1 if side == "ours, row by row" else rows
    for first in range(0, rows, size):
        batch = world.batch("train", np.arange(first, first + size), rows).to(device)
        loss = module.training_step(batch, 0)
        loss.backward()
        total += float(loss)
    return total


def equality(module: Any, world: World, rows: int) -> str:
    """How far losses and gradients of the sides are apart.

    Raises:
        AssertionError: by 1e-4 or more, of the gradients as the length of their difference in parts of their
            own.
    """
    found = {}
    for side in SIDES:
        loss = step(module, world, rows, side)
        found[side] = loss, {n: g.clone() for n, g in gradients(module).items()}
    (theirs, wanted), apart, worst = found["theirs"], 0.0, 0.0
    for loss, mine in (found[side] for side in SIDES[1:]):
        gap = torch.cat([(mine[n] - g).flatten() for n, g in wanted.items()]).norm()
        length = torch.cat([g.flatten() for g in wanted.values()]).norm()
        apart, worst = max(apart, abs(loss - theirs)), max(worst, float(gap / length))
    assert apart < 1e-4, f"losses differ by {apart}"
    assert worst < 1e-4, f"gradients differ by {worst}"
    return (
        f"the sides differ, on prompts of 3 films and 4 candidates: loss {apart:.0e}, gradients {worst:.0e} "
        "of their length"
    )


def medians(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in alternating order, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works)[:: 1 if number % 2 else -1]:
            _wait()
            start = time.perf_counter()
            works[name]()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Memory ------------------------------------------------------------------------------------------------


def peak(work: Callable[[], Any]) -> tuple[float, float] | None:
    """MiB at most while it runs, and how much of them was not there before; None where nobody can tell."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        most = torch.cuda.max_memory_allocated()
        return most / 2**20, (most - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # the largest resident set begins anew
    before = _status("VmRSS")
    work()
    most = _status("VmHWM")
    return most / 2**10, (most - before) / 2**10


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def memory(
    arguments: argparse.Namespace, parts: Parts, device: torch.device
) -> tuple[float, float] | None:
    """``peak`` of a step of ``arguments.memory_of``, in a process that does nothing else."""
    module, world = parts.stage2(device)
    # The weights are resident, and what is computed once is there.
    module.model(input_ids=torch.ones(1, 4, dtype=torch.long, device=device))
    module.user_states("train")
    module.item_states()
    gc.collect()
    return peak(lambda: step(module, world, arguments.rows, arguments.memory_of))


def measured_apart(arguments: argparse.Namespace, side: str) -> list[float] | None:
    """``peak`` of a side's step in a process of its own."""
    words = ["--llm", arguments.llm, "--rows", str(arguments.rows), "--memory-of", side]
    words += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_a_llmrec", *words],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side} failed in a process of its own:\n{done.stderr}")
    found: list[float] | None = json.loads(done.stdout.splitlines()[-1])
    return found


# Evaluation --------------------------------------------------------------------------------------------


def generated(module: Any, batch: Any, least: int, most: int) -> Tensor:
    """(B, N) tokens that are written as their code does, from embeddings."""
    users = module.user_states("test")[batch.row]
    embeddings = filled(module, batch.tokens, batch.slots.tolist(), users)
    tokenizer = module.tokenizer
    found: Tensor = module.model.generate(
        inputs_embeds=embeddings, attention_mask=batch.token_mask, do_sample=False, num_beams=1,
        temperature=None, top_p=None, top_k=None, repetition_penalty=PENALTY, use_cache=True,
        min_new_tokens=least, max_new_tokens=most, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return found


def evaluation(module: Any, world: World, rows: int, rounds: int) -> Table:
    """Users/s of generation, of three lengths, and of likelihoods."""
    batch = world.batch("test", np.arange(rows)).to(module.device)
    longest = max(len(module.table.title(int(i))) for i in batch.target) + 1
    module._split, lengths = "test", {}

    def write(name: str, least: int, most: int) -> None:
        lengths[name] = generated(module, batch, least, most).shape[1]

    cases = {"ends by itself": (0, WRITTEN), f"all {WRITTEN} tokens": (WRITTEN, WRITTEN),
             "a title's tokens, as if trained": (longest, longest)}  # fmt: skip
    with torch.inference_mode():
        scoring = medians({"": lambda: module.encode(batch)}, rounds)[""]
        table = Table(title=f"evaluation, {rows} users at a time, users/s")
        for column in ("theirs: generation", "tokens", "theirs", "ours: likelihoods", "ratio"):
            table.add_column(column)
        generated(module, batch, 2, 2)  # warms up
        for name, (least, most) in cases.items():
            start = time.perf_counter()
            write(name, least, most)
            _wait()
            seconds = time.perf_counter() - start
            values = f"{rows / seconds:.3f}", f"{rows / scoring:.3f}", f"{seconds / scoring:.1f}"
            table.add_row(name, str(lengths[name]), *values)
    return table


# Sentences ---------------------------------------------------------------------------------------------


def sentences(parts: Parts, rounds: int, device: torch.device) -> Table:
    """Steps of the first stage: 32 users, their item and another, 64 texts."""
    modules = {trained: parts.stage1(trained, device) for trained in ("all", "none")}
    rows = np.arange(32)

    def run(trained: str, frozen: bool = False) -> None:
        module, world = modules[trained]
        batch = world.batch("train", rows).to(device)
        module.zero_grad()
        if module.encoder.model is not None:
            module.encoder.model.requires_grad_(not frozen)
        module.training_step(batch, 0).backward()

    found = medians(
        {
            "encoded and trained, as theirs": lambda: run("all"),
            "encoded each step, frozen": lambda: run("all", frozen=True),
            "encoded once, kept": lambda: run("none"),
        },
        rounds,
    )
    kept = found["encoded once, kept"]
    table = Table(title="a step of the first stage, 64 texts")
    for column in ("sentence encoding", "ms", "ratio"):
        table.add_column(column)
    for name, seconds in found.items():
        table.add_row(name, f"{1000 * seconds:.1f}", f"{seconds / kept:.1f}")
    return table


# Growth ------------------------------------------------------------------------------------------------


def growth(parts: Parts, rows: int, rounds: int, device: torch.device) -> Table:
    """Our seconds a user, step and evaluation, by what a prompt lists."""
    table = Table(title="ours, by history, candidates and users at a time")
    for column in (
        "history",
        "candidates",
        "users",
        "tokens",
        "step, s/user",
        "evaluation, s/user",
    ):
        table.add_column(column)
    half, twice = max(1, rows // 2), 2 * rows
    cases = ((SHOWN, CANDIDATES, rows), (SHOWN // 2, CANDIDATES, rows), (2 * SHOWN, CANDIDATES, rows),
             (SHOWN, CANDIDATES // 2, rows), (SHOWN, 2 * CANDIDATES, rows),
             (SHOWN, CANDIDATES, half), (SHOWN, CANDIDATES, twice))  # fmt: skip
    for shown, candidates, users in cases:
        module, world = parts.stage2(device, shown, candidates)
        batch = world.batch("test", np.arange(users)).to(device)
        module._split = "test"

        def score(module: Any = module, batch: Any = batch) -> None:
            with torch.inference_mode():
                module.encode(batch)

        def train(module: Any = module, world: World = world, users: int = users) -> None:
            step(module, world, users, "ours")

        found = medians({"step": train, "score": score}, rounds)
        each = [f"{found[name] / users:.3f}" for name in ("step", "score")]
        tokens = f"{float(batch.token_mask.sum()) / users:.0f}"
        table.add_row(str(shown), str(candidates), str(users), tokens, *each)
        del module, world, batch, score, train
        gc.collect()
    return table


def arithmetic(name: str, model: Any, tokens: float, answer: float, rows: int) -> Table:
    """What the head alone decides: theirs over ours in FLOPs of a step, and the bytes of logits."""
    head = model.get_output_embeddings().weight
    layers = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    models = {name: (sum(layers) - head.numel(), *head.shape), **OTHERS}
    table = Table(title=f"by arithmetic: {rows} prompts of {tokens:.0f} tokens")
    for column in (
        "model",
        "P without head",
        "head",
        "FLOPs, theirs / ours",
        "logits, theirs",
        "ours",
    ):
        table.add_column(column)
    for name, (body, vocabulary, width) in models.items():
        head_weights = vocabulary * width
        ratio = (body + head_weights) / (body + head_weights * answer / tokens)
        sizes = (f"{rows * n * vocabulary * 4 / 2**20:.0f} MiB" for n in (tokens, answer))
        table.add_row(
            name, f"{body / 1e6:.0f}M", f"{head_weights / 1e6:.0f}M", f"{ratio:.2f}", *sizes
        )
    return table


# The whole ---------------------------------------------------------------------------------------------


def specs(name: str, folder: Path) -> tuple[BackboneSpec, SentenceEncoderSpec]:
    """The language model, in float32, and the sentence encoder."""
    if name == "tiny":
        source = str(write_tiny_llm(folder / "llm", longest=4096))
        encoder = SentenceEncoderSpec(str(write_tiny_bert(folder / "bert")), max_length=16)
        return BackboneSpec(source, dtype="float32", max_length=4000), encoder
    found: BackboneSpec = build.build(
        config.load("a_llmrec/movielens_100k", [f"llm={name}"]).config["llm"]
    )
    return replace(found, dtype="float32", max_length=2048), SentenceEncoderSpec(max_length=128)


def steps(arguments: argparse.Namespace, module: Any, world: World) -> Table:
    """Seconds and memory of a step of each side."""
    rows = arguments.rows
    losses: dict[str, float] = {}

    def run(side: str) -> None:
        losses[side] = step(module, world, rows, side)

    seconds = medians({side: partial(run, side) for side in SIDES}, arguments.steps)
    apart = max(abs(loss - losses["theirs"]) for loss in losses.values())
    assert apart < 1e-4, f"losses differ by {apart}"
    found_memory = {side: measured_apart(arguments, side) for side in SIDES}
    table = Table(title=f"a step of {rows} users; losses differ by {apart:.0e}")
    for column in ("side", "s", "faster", "MiB in all", "share", "MiB beyond weights", "share"):
        table.add_column(column)
    base = found_memory["theirs"]
    for side in SIDES:
        cells = [side, f"{seconds[side]:.2f}", f"{seconds['theirs'] / seconds[side]:.2f}"]
        found = found_memory[side]
        for which in (0, 1):
            told = found is not None and base is not None
            cells += (
                [f"{found[which]:.0f}", f"{found[which] / base[which]:.2f}"] if told else ["-", "-"]
            )
        table.add_row(*cells)
    return table


def compare(
    arguments: argparse.Namespace, parts: Parts, device: torch.device, console: Console
) -> None:
    """Print what was asked for, but for growth, which loads models of its own."""
    module, world = parts.stage2(device)
    rows, batch = arguments.rows, world.batch("train", np.arange(arguments.rows))
    assert batch.token_mask is not None
    assert batch.answers is not None
    tokens = float(batch.token_mask.sum()) / rows
    answer = float((batch.answers != NO_LOSS).sum()) / rows
    console.print(
        f"{arguments.llm} in float32 on {device}, {torch.get_num_threads()} threads; prompts and answers of "
        f"{tokens:.0f} tokens, {answer:.0f} of them the answer's"
    )
    console.print(arithmetic(arguments.llm, module.model, tokens, answer, rows))
    if "steps" in arguments.only:
        console.print(equality(*parts.stage2(device, 3, 4), min(2, rows)))
        console.print(steps(arguments, module, world))
    if "sentences" in arguments.only:
        console.print(sentences(parts, max(3, arguments.steps), device))
    if "evaluation" in arguments.only:
        console.print(evaluation(module, world, rows, arguments.steps))


def main() -> None:
    """Measure, and print tables of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--llm", default="smollm2_135m", help="a file of experiments/llm, or tiny")
    parser.add_argument("--steps", type=int, default=3, help="rounds that are timed")
    parser.add_argument("--rows", type=int, default=4, help="users of a batch (the paper: 4)")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--only", nargs="+", choices=("steps", "sentences", "evaluation", "growth"),
                        default=["steps", "sentences", "evaluation", "growth"])  # fmt: skip
    parser.add_argument("--memory-of", choices=SIDES, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder), *specs(arguments.llm, Path(folder)))
        if arguments.memory_of:
            sys.stdout.write(json.dumps(memory(arguments, parts, device)) + "\n")
            return
        console = Console(width=120)
        compare(arguments, parts, device, console)
        if "growth" in arguments.only:
            console.print(growth(parts, arguments.rows, max(1, arguments.steps // 2), device))


if __name__ == "__main__":
    main()
