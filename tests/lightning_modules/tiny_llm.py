"""Language models of random weights: the code paths of real ones, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH, LONGEST, WINDOW = 64, 128, 6
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "The user liked Heat (1995) and disliked Jaws (1975).",
    "Will the user like Alien (1979)? Answer Yes or No.",
    "Yes", "No", "recommend the next film of this history",
]  # fmt: skip


def write_tiny_tokenizer(
    folder: Path, template: bool = True, pad: str | None = "<pad>", longest: int = LONGEST,
    begins: bool = False,
) -> Any:  # fmt: skip
    """A byte-level BPE that is trained on a few sentences; specials: unk 0, bos 1, eos 2, pad 3.

    ``begins``: texts begin with bos, as LLaMA's and Gemma's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
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


def write_tiny_llm(
    folder: Path, seed: int = 0, template: bool = True, longest: int = LONGEST, **settings: Any
) -> Path:
    """Save a LlamaForCausalLM (2 layers, d = 64) and its tokenizer as ``save_pretrained`` does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = write_tiny_tokenizer(folder, template, longest=longest)
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=longest,
            bos_token_id=1, eos_token_id=2, pad_token_id=3, **{**shape, **settings},
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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
