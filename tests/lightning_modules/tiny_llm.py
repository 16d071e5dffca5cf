"""Language models of random weights: the code paths of real ones, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_modules.llm.random_models import write_llama, write_tokenizer

WIDTH, LONGEST, WINDOW = 64, 128, 6
CORPUS = [
    "The user liked Heat (1995) and disliked Jaws (1975).",
    "Will the user like Alien (1979)? Answer Yes or No.",
    "Yes", "No", "recommend the next film of this history",
]  # fmt: skip


def write_tiny_tokenizer(folder: Path, longest: int = LONGEST, **options: Any) -> Any:
    """See ``write_tokenizer``; trained on a few sentences."""
    return write_tokenizer(folder, CORPUS, longest, **options)


def write_tiny_llm(
    folder: Path, seed: int = 0, template: bool = True, longest: int = LONGEST, **settings: Any
) -> Path:
    """Save a LlamaForCausalLM (2 layers, d = 64) and its tokenizer as ``save_pretrained`` does."""
    tokenizer = write_tiny_tokenizer(folder, template=template, longest=longest)
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }  # fmt: skip
    write_llama(folder, seed, len(tokenizer), longest, **{**shape, **settings})
    return folder


def write_wide_llm(folder: Path, longest: int) -> Path:
    """Two layers, wide enough for kernels' blocks; weights small enough not to saturate anything."""
    return write_tiny_llm(
        folder, longest=longest, hidden_size=256, intermediate_size=512, initializer_range=0.05
    )


def write_tiny_opt(folder: Path, seed: int = 0, longest: int = LONGEST) -> Path:
    """Save an OPTForCausalLM: layer norms, biases, and feed-forward layers called fc1 and fc2."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = write_tiny_tokenizer(folder, template=False, longest=longest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = OPTConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=128,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=longest,
            init_std=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        )  # fmt: skip
        OPTForCausalLM(config).save_pretrained(folder)
    return folder


def write_tiny_gemma(folder: Path, seed: int = 0, longest: int = LONGEST) -> Path:
    """Save a Gemma3ForCausalLM: one layer sees ``WINDOW`` tokens, the other all; embeddings are scaled."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = write_tiny_tokenizer(folder, template=False, longest=longest, begins=True)
    config = Gemma3TextConfig(
        **_windowed(len(tokenizer), longest), head_dim=16, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return _save(Gemma3ForCausalLM, config, folder, seed)


def write_tiny_mistral(folder: Path, seed: int = 0, longest: int = LONGEST) -> Path:
    """Save a MistralForCausalLM, whose layers all see ``WINDOW`` tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = write_tiny_tokenizer(folder, template=False, longest=longest, begins=True)
    config = MistralConfig(**_windowed(len(tokenizer), longest), tie_word_embeddings=True)
    return _save(MistralForCausalLM, config, folder, seed)


def _windowed(vocabulary: int, longest: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "max_position_embeddings": longest, "sliding_window": WINDOW,
        "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip


def _save(kind: Any, config: Any, folder: Path, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    return folder


TINY = {
    "llama": write_tiny_llm, "opt": write_tiny_opt, "gemma": write_tiny_gemma,
    "mistral": write_tiny_mistral,
}  # fmt: skip


def tallrec_words(llm: Path, root: Path, examples: int) -> list[str]:
    """Overrides that make TALLRec's few-shot experiments small: so many examples, and this language model."""
    return [
        f"data.root={root}", "data.expected=null", f"data.examples.count={examples}",
        f"data.examples.valid={examples}", f"++llm.source={llm}", "++llm.max_length=1024",
        "launch.threads=1",
    ]  # fmt: skip
