"""Small language models of random weights: whole chains in seconds, before a real model is loaded.

Their architecture is a real one, their tokenizer knows bytes, and what they answer means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.llm.saving import save_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Its frequent pairs of bytes become tokens, so that words are a few tokens each.
_ENGLISH = (
    "Somebody has told us which films and books they liked and which they disliked.",
    "Will they like one more of them? Answer yes or no, with its title, and nothing else.",
    "The user has watched these films, the oldest first. Which one will they watch next?",
)


def require_sizes(width: int, layers: int, longest: int) -> None:
    """Raises ValueError for sizes that no model of random weights has."""
    if width < 32 or width % 32 or min(layers, longest) < 1:
        raise ValueError(
            f"width is {width}, layers {layers} and longest {longest}: expected a multiple of 32 and two "
            "positive numbers"
        )


@dataclass(frozen=True)
class RandomModel:
    """A LLaMA of random weights, made in the cache when it is first needed.

    Args:
        seed: of the weights.
        width: of the embeddings, a multiple of 32.
        layers: of the transformer.
        longest: tokens that it can read.

    Raises:
        ValueError: a size that no such model has.
    """

    seed: int = 0
    width: int = 64
    layers: int = 2
    longest: int = 4096

    def __post_init__(self) -> None:
        require_sizes(self.width, self.layers, self.longest)

    @property
    def name(self) -> str:
        """Its sizes."""
        return f"random-{self.layers}x{self.width}"

    def write(self, folder: Path) -> None:
        """Fill ``folder`` as ``save_pretrained`` does."""
        shape = {
            "hidden_size": self.width, "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,  # logits as far apart as a trained model's
        }  # fmt: skip
        tokenizer = write_tokenizer(folder, _ENGLISH, self.longest)
        write_llama(folder, self.seed, len(tokenizer), self.longest, **shape)


def write_tokenizer(
    folder: Path,
    corpus: Sequence[str],
    longest: int,
    template: bool = True,
    pad: str | None = "<pad>",
    begins: bool = False,
) -> Any:
    """Save a byte-level BPE of at most 400 tokens; specials: unk 0, bos 1, eos 2, pad 3.

    Args:
        folder: to fill.
        corpus: texts that pairs are counted in.
        longest: tokens that its model reads.
        template: with a chat template.
        pad: the padding's token.
        begins: texts begin with bos, as LLaMA's and Gemma's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest,
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad,
    )  # fmt: skip
    if template:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def write_llama(folder: Path, seed: int, vocabulary: int, longest: int, **shape: Any) -> None:
    """Save a LlamaForCausalLM of this shape for a tokenizer of ``write_tokenizer``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=longest,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, **shape,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_model(LlamaForCausalLM(config), folder)
