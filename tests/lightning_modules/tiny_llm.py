"""Language models of random weights: the code paths of real ones, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH, LONGEST = 64, 128
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
    folder: Path, template: bool = True, pad: str | None = "<pad>", longest: int = LONGEST
) -> Any:
    """A byte-level BPE that is trained on a few sentences; specials: unk 0, bos 1, eos 2, pad 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
