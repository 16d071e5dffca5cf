"""Language models: tuning against transformers' Trainer, scoring against generating and one by one.

``python -m tests.benchmarks.bench_llm``. All is measured in one run, on the prompts of
``tallrec/movie_64shot`` and the language model of its config, with the same threads:

* tuning: samples/s of our fit through the Lightning Trainer and of transformers' Trainer with PEFT and its
  own grouping by length; the same model, adapter, dtype, rows, supervised tokens and global batch, in turns;
* yes/no: rows/s of the margin against ``generate`` at the same batch size and by the model just tuned, once
  stopping at the end of the text and once with 128 forced tokens (what TALLRec's code asks for). Ours reads
  the prompts' common opening once for all of an evaluation's 1,000 rows: a batch is charged its share;
* candidates: rows/s of 20 titles behind one prompt against one sequence a candidate, and how far their
  log-likelihoods are apart in float32, bfloat16 and 4 bits;
* the share of the machine's measured peak that tuning and scoring reach.

FLOPs are 2 a weight and token in forward; backward adds 2 for the gradients of activations (frozen weights
need none of their own), and LoRA's own products are left out. Attention's products are left out, too (a few
percent at these lengths).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from datamodules.loading import ExampleDataset
from datamodules.samplers import RowBatch
from datamodules.types import TEST
from experiments import build, config
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer, resolve_dtype
from lightning_modules.llm.candidate_scoring import candidate_log_likelihoods
from lightning_modules.llm.label_scoring import SharedPrefix, last_logits, margin, pad_left
from lightning_modules.llm.precision import QLoRAPrecision

EXPERIMENT = "tallrec/movie_64shot"
IGNORED = -100
EVALUATED = 1_000  # test rows, for which the opening is read once
Tokens = list[int]


def best(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest repeat, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def peak_flops(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best product of square matrices up to ``width``."""
    found = 0.0
    for size in (width, 2 * width):
        a = torch.randn(size, size, dtype=dtype, device=device)
        found = max(found, 2 * size**3 / best(lambda a=a: (a @ a).sum().item(), 5))
    return found


class StepClock(pl.Callback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After each micro batch, not all of which end a step."""
        if trainer.global_step > len(self.ends):
            self.ends.append(time.perf_counter())


class Setup:
    """The experiment's data, prompts, module and specs."""

    def __init__(self, overrides: Sequence[str]) -> None:
        experiment = config.load(EXPERIMENT, list(overrides))
        self.stage = experiment.stages["train"]
        self.node = self.stage["module"]
        self.data: Any = build.build(experiment.config["data"])
        self.data.prepare_data()
        self.batch_size = int(self.stage["batch_size"])
        self.micro = int(experiment.config["launch"]["micro_batch_size"] or self.batch_size)
        self.data.batch_size, self.data.num_workers, self.data.seed = self.batch_size, 0, 0
        self.data.test_code = TEST

    def module(self) -> Any:
        """A fresh method, its language model not yet loaded."""
        return build.build_on({**self.node, "loss": "answer"}, self.data)


def ours(setup: Setup, epochs: int) -> tuple[float, Any]:
    """Seconds an optimizer step of our fit, and the module that was trained."""
    module, clock = setup.module(), StepClock()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plugin = module.precision_plugin(device, "auto")
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs, accumulate_grad_batches=max(1, setup.batch_size // setup.micro),
            callbacks=[clock], plugins=[plugin] if plugin else None, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, limit_val_batches=0, default_root_dir=folder,
            gradient_clip_val=1.0, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=setup.data)
    steps = np.diff(clock.ends)
    return float(steps.mean()), module


def theirs(
    setup: Setup, module: Any, prompts: list[Tokens], labels: np.ndarray, epochs: int
) -> float:
    """Seconds an optimizer step of transformers' Trainer on the same rows."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    rows = []
    for ids, liked in zip(prompts, labels, strict=True):
        end = list(module.answer_tokens.full[0 if liked else 1])
        rows.append({
            "input_ids": ids + end, "attention_mask": [1] * (len(ids) + len(end)),
            "labels": [IGNORED] * len(ids) + end, "length": len(ids) + len(end),
        })  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_causal_lm(module.llm, device)
    base.set_attn_implementation("sdpa")  # transformers' own, not what we register with it
    model = attach_adapter(base, module.adapter, 0)
    model.train()
    half = resolve_dtype(module.llm, device) == torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, use_cpu=device.type == "cpu", bf16=half,
            per_device_train_batch_size=setup.micro,
            gradient_accumulation_steps=max(1, setup.batch_size // setup.micro),
            train_sampling_strategy="group_by_length", learning_rate=module.learning_rate,
            max_grad_norm=1.0, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, remove_unused_columns=False, log_level="error",
        )  # fmt: skip
        collate = DataCollatorForSeq2Seq(module.tokenizer, padding=True, label_pad_token_id=IGNORED)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=_without_length(collate),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return float(np.diff(ends).mean())


def _without_length(collate: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda rows: collate([{k: v for k, v in row.items() if k != "length"} for row in rows])


def yes_no(
    module: Any, model: Any, prompts: list[Tokens], opening: Tokens, batch: int, repeats: int
) -> dict[str, float]:
    """Seconds a batch: the margin, and ``generate`` to the end of the text and for 128 tokens."""
    pad, end = module.tokenizer.pad_token_id, module.tokenizer.eos_token_id
    tokens, mask = (x.to(model.device) for x in pad_left(prompts[:batch], pad))
    read = SharedPrefix(model, opening)
    options = {"do_sample": False, "pad_token_id": pad, "eos_token_id": end, "use_cache": True}

    def generate(**length: int) -> Any:
        return model.generate(input_ids=tokens, attention_mask=mask, **options, **length)

    def margins() -> Any:
        return margin(read.last_logits(tokens, mask)[:, 0], module.answer_tokens)

    with torch.inference_mode():
        works = {
            "margin": margins,
            "one forward, nothing shared": lambda: last_logits(model, tokens, mask),
            "generate to the end": lambda: generate(max_new_tokens=128),
            "generate 128": lambda: generate(max_new_tokens=128, min_new_tokens=128),
        }
        seconds = {name: best(work, repeats) for name, work in works.items()}
        seconds["margin"] += best(lambda: SharedPrefix(model, opening), repeats) * batch / EVALUATED
        return seconds


def in_one_pass(model: Any, prompt: Tokens, titles: list[Tokens], pad: int) -> torch.Tensor:
    """Log-likelihoods (C,) of titles behind one prompt, by ours."""
    return candidate_log_likelihoods(model, [prompt], [titles], pad).total[0]


def one_by_one(model: Any, prompt: Tokens, titles: list[Tokens], pad: int) -> torch.Tensor:
    """The same (C,) with a sequence for each."""
    tokens, mask = pad_left([prompt + title for title in titles], pad)
    most = max(map(len, titles)) + 1
    logits = last_logits(model, tokens.to(model.device), mask.to(model.device), most)
    # torch's log_softmax is 1e-5 off where it adds up so many in float32; its logsumexp is not.
    mass = logits.logsumexp(-1)  # (C, most)
    found = []
    for row, sums, title in zip(logits, mass, titles, strict=True):
        read = slice(-len(title) - 1, -1)
        asked = torch.tensor(title, device=model.device)[:, None]
        found.append((row[read].gather(-1, asked)[:, 0] - sums[read]).sum())
    return torch.stack(found)


def precisions(
    module: Any, prompts: list[Tokens], titles: list[Tokens], device: torch.device
) -> list[str]:
    """How far candidates in one pass and one by one are apart in each precision, and from float32."""
    pad, told, exact = module.tokenizer.pad_token_id, [], None
    for dtype, quantization in (("float32", None), ("bfloat16", None), ("auto", "nf4-dq")):
        spec = replace(module.llm, dtype=dtype, quantization=quantization)
        plugin = QLoRAPrecision.for_spec(spec) if quantization else None
        model = load_causal_lm(spec, device, plugin and plugin.quantization_config(device))
        with torch.inference_mode():
            ours, naive = (
                torch.stack([score(model, p, titles, pad).cpu() for p in prompts])
                for score in (in_one_pass, one_by_one)
            )  # (P, C)
        exact = naive if exact is None else exact
        told.append(
            f"{quantization or dtype}: one pass and one by one differ by at most {apart(ours, naive)}; "
            f"from float32 by {apart(ours, exact)}"
        )
    return told


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """The largest difference of two sets of log-likelihoods (P, C), and how often the best agree."""
    same = (ours.argmax(1) == theirs.argmax(1)).sum()
    return f"{(ours - theirs).abs().max():.1e} (best candidate equal for {same} of {len(ours)} prompts)"


def weights_a_token(model: Any) -> tuple[int, int]:
    """Weights of the layers that each token passes, and of the head, which few pass."""
    head = model.get_output_embeddings().weight.numel()
    layers = [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora" not in n
    ]
    return sum(layer.weight.numel() for layer in layers) - head, head


def main() -> None:
    """Measure, and print one table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--epochs", type=int, default=1, help="of the 64 rows, a turn of tuning")
    parser.add_argument("--turns", type=int, default=2, help="of ours and theirs, for tuning")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 16], help="yes/no batch sizes"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compared", type=int, default=4, help="prompts to compare precisions on")
    parser.add_argument("overrides", nargs="*", help="of the experiment, such as llm=qwen3_0.6b")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    setup = Setup(arguments.overrides)
    steps, module = ours(setup, arguments.epochs)
    our_steps = [steps]
    examples = setup.data.prepared.examples()
    dataset = ExampleDataset(setup.data.histories, examples, 0, setup.data.liked_above)
    rows = dataset[RowBatch.every(len(examples))]
    assert rows.label is not None
    prompts = [ids.tolist() for ids in module.table.of(rows)]
    model = module.model.eval()  # tuned: it answers in a word
    their_steps = []
    for turn in range(arguments.turns):
        if turn:
            our_steps.append(ours(setup, arguments.epochs)[0])
        their_steps.append(theirs(setup, module, prompts, rows.label, arguments.epochs))
    our_step, their_step = float(np.mean(our_steps)), float(np.mean(their_steps))
    tokenizer = load_tokenizer(module.llm)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opening = module.table.common_prefix()
    body, head = weights_a_token(model)
    peak = peak_flops(1024, model.dtype, device)
    mean = float(np.mean([len(p) for p in prompts]))
    table = Table(title=f"{module.llm.source}, {torch.get_num_threads()} threads, {model.dtype}, "
                        f"prompts of {mean:.0f} tokens, {len(opening)} of them shared")  # fmt: skip
    for column in ("what", "ours", "theirs", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    batch = setup.batch_size

    def row(what: str, count: float, seconds: float, other: float) -> None:
        """Rates of ``count`` rows in our and in the others' seconds."""
        ratio = f"{other / seconds:.2f}"
        table.add_row(what, f"{count / seconds:.2f}", f"{count / other:.2f}", ratio)

    row("tuning, samples/s: transformers' Trainer", batch, our_step, their_step)
    for size in arguments.batches:
        found = yes_no(module, model, prompts, opening, size, arguments.repeats)
        for against, seconds in list(found.items())[1:]:
            row(f"yes/no, batch {size}, rows/s: {against}", size, found["margin"], seconds)
    titles = [tokenizer(f" {t}", add_special_tokens=False)["input_ids"] for t in module.shown[1:21]]
    pad = tokenizer.pad_token_id
    with torch.inference_mode():
        shared, naive = (
            best(lambda s=score: s(model, prompts[0], titles, pad), arguments.repeats)
            for score in (in_one_pass, one_by_one)
        )
    row("20 candidates, rows/s: one sequence each", 1, shared, naive)
    console = Console()
    console.print(table)
    micro = max(1, batch // setup.micro)
    tokens = batch * (mean - len(opening)) + micro * len(opening)
    tuning = 4 * tokens * body / our_step
    size = arguments.batches[-1]
    widest = max(map(len, prompts[:size])) - len(opening)
    scoring = 2 * size * (widest * body + head) / found["margin"]
    console.print(
        f"peak {peak / 1e9:.0f} GFLOP/s; tuning reaches {tuning / peak:.0%}, scoring {scoring / peak:.0%} "
        f"({tokens / our_step:.0f} and {size * widest / found['margin']:.0f} tokens/s computed)"
    )
    for line in precisions(module, prompts[: arguments.compared], titles, device):
        console.print(line)


if __name__ == "__main__":
    main()
