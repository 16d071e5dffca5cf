"""Reload equality: a model whose weights were read must be the model that has saved them.

Each checkpoint tells of every trained weight a digest, and what its model answered to a fixed text. Whoever
reads it to test, to predict or to export looks for the same.

Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.llm.backbones import resolve_dtype
from lightning_modules.llm.guards import digests
from lightning_modules.llm.label_scoring import last_logits, only_tokens

WRITTEN = "written"  # the key of a checkpoint that holds what ``tell_written`` notes
_ASKED = 256  # tokens of the vocabulary that a probe looks at, at most
_TEXT = "Somebody has told us what they liked and disliked. Will they like one more? Yes or no:\n"
# How far answers may be apart: float32 differs by the order of sums; all others by roundings of up to 0.4% in
# every layer, on another device by other ones.
_SAME = {"float32": 1e-3}
_ROUNDED = 0.1


@torch.no_grad()
def probe(model: Any, tokenizer: Any) -> Tensor:
    """(N,) float32 logits behind a fixed text, of tokens spread over the vocabulary, minus their mean.

    Whatever the model computes with takes part: frozen weights, the adapter and its scale, the precision.
    Modes and random numbers stay as they are.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        tokenizer: its own.
    """
    text = torch.tensor([tokenizer(_TEXT)["input_ids"]], device=model.device)
    vocabulary = len(model.get_output_embeddings().weight)
    asked = torch.linspace(0, vocabulary - 1, min(_ASKED, vocabulary)).long().tolist()
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with only_tokens(model, asked):
            logits = last_logits(model, text, torch.ones_like(text))[0, 0]
    finally:
        for part, mode in modes:
            part.training = mode
    return (logits - logits.mean()).cpu()


def tell_written(module: Any, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint what it holds and what the module answers; of split weights all ranks have to.

    Args:
        module: a ``LanguageModelModule`` in a trainer.
        checkpoint: with its weights.
    """
    state = checkpoint["state_dict"]
    checkpoint[WRITTEN] = {
        "digests": digests((n, state[n]) for n in trained(module) if n in state),
        "answers": _answers(module),
        "precision": _precision(module),
    }
    if module.llm.rounding == "gptq":
        checkpoint[WRITTEN]["prompts"] = module.rounded_by


def rounding_prompts(module: Any) -> list[str]:
    """What the language model is rounded by: as it was when the weights were trained that it takes, if any.

    Whatever the catalogue has become since then: an adapter belongs to the weights that it was trained on.
    """
    path: Path | None = module.source
    if path is not None and path.is_file():
        written = torch.load(path, map_location="cpu", weights_only=True).get(WRITTEN, {})
        if "prompts" in written:
            return list(written["prompts"])
    own: list[str] = module.calibration_prompts()
    return own


def trained(module: Any) -> dict[str, Tensor]:
    """All that is trained of a module, by every name that it has."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: weight for name, weight in named if weight.requires_grad}


def _answers(module: Any) -> Tensor:
    """(N,) of ``probe``, as the module's trainer computes."""
    plugin = module.trainer.precision_plugin
    with plugin.forward_context() if plugin else nullcontext():
        return probe(module.model, module.tokenizer)


def _precision(module: Any) -> str:
    """``bfloat16``, or ``bfloat16 nf4 64``: what a model computes in, and how its weights are kept."""
    dtype, llm = str(resolve_dtype(module.llm, module.model.device)), module.llm
    kept = f" {llm.quantization} {llm.block_size}" if llm.quantization else ""
    return dtype.removeprefix("torch.") + kept + (" gptq" if llm.rounding == "gptq" else "")


@dataclass(frozen=True)
class Reloaded:
    """What was read from a checkpoint, and must be found where its weights are used."""

    path: Path
    digests: dict[str, str]  # of all that was trained, in the types of the module that has read it
    answers: Tensor | None  # (N,) of the model that wrote it; None of older code
    precision: str

    @classmethod
    def of(cls, path: Path, checkpoint: Mapping[str, Any], module: Any) -> Reloaded:
        """Of a checkpoint that a module is about to take its weights from.

        Raises:
            ModelError: a weight is not the one that the fit has written.
        """
        own, state, told = trained(module), checkpoint["state_dict"], checkpoint.get(WRITTEN)
        names = [n for n in (told["digests"] if told else own) if n in state]
        stored = digests((n, state[n]) for n in names)
        if told and (changed := _differing(told["digests"], stored)):
            raise ModelError(
                f"{path} is damaged: its {changed[0]} is not what the fit has written. Restore the file, or "
                "train anew"
            )
        typed = ((n, state[n].to(own[n].dtype) if n in own else state[n]) for n in names)
        answers, precision = (told["answers"], told["precision"]) if told else (None, "")
        return cls(path, digests(typed), answers, precision)

    def require(self, module: Any, ask: bool = True) -> None:
        """Refuse a module that is not the one that was saved.

        Args:
            module: which has taken the weights.
            ask: also compare answers, which needs a trainer. Those of another precision than the fit's are
                not compared: a 4-bit model is meant to be another.

        Raises:
            ModelError: a trained weight was not in the checkpoint, or is not as it was read; one of the
                checkpoint is not trained here; or the model answers otherwise.
        """
        if changed := _differing(self.digests, digests(trained(module).items())):
            raise ModelError(
                f"{changed[0]} is not what {self.path} holds (nor are {len(changed) - 1} more): it is "
                "trained in one and not in the other, or has moved since it was read. Set module.adapter to "
                "what was trained, or train anew"
            )
        if not ask or self.answers is None or _precision(module) != self.precision:
            return
        apart = float((_answers(module) - self.answers).norm() / self.answers.norm())
        most = _SAME.get(self.precision, _ROUNDED)
        if not apart <= most:  # NaN is not
            raise ModelError(
                f"with the weights of {self.path} the language model does not answer as it did when they "
                f"were saved: {apart:.2g} apart, of which {most:g} could be rounding. The language model's "
                "files are others, or packages compute otherwise: restore them, or train anew"
            )


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names that only one of two ``digests`` has, or both with unlike values."""
    return sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
