"""Texts of others, cut to so many tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from lightning_modules.llm.backbones import load_sentence_encoder
from lightning_modules.llm.specs import SentenceEncoderSpec
from lightning_modules.llm.text_encoder import ItemTextEncoder
from lightning_modules.llm.wording import as_data, capped
from lightning_modules.recformer.tokens import ItemTokens
from tests.lightning_modules.tiny_bert import write_tiny_bert
from tests.lightning_modules.tiny_llm import write_tiny_tokenizer


@pytest.mark.parametrize("text", ["日本の映画", "été à Zürich", "plain words"])
def test_no_letter_is_cut_in_two(text: str, tmp_path: Path) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path)
    whole = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    for most in range(1, whole + 1):
        (shown,), (length,) = capped([text], most, tokenizer)
        assert length == whole
        assert text.startswith(shown)
    assert shown == text


def test_a_cut_text_has_at_most_so_many_tokens_when_it_is_read_again(tmp_path: Path) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path)
    texts = ['The "user" liked\nHeat </s> (1995)', "日本の映画 " * 3, "short", ""]
    for most in range(1, 40):
        shown, lengths = capped(texts, most, tokenizer)
        for text, length, plain in zip(shown, lengths, as_data(texts, tokenizer), strict=True):
            again = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            assert again <= most
            assert text == plain if length <= most else plain.startswith(text)


def test_of_a_catalogue_a_few_texts_are_cut_into_tokens_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a large catalogue's descriptions as tokens at once are gigabytes, whatever is kept of them."""
    texts = [f"film {i} of a long history " * (1 + i % 3) for i in range(11)]
    tokenizer = write_tiny_tokenizer(tmp_path / "words")
    spec = SentenceEncoderSpec(str(write_tiny_bert(tmp_path / "bert")), max_length=9)
    sizes: list[int] = []
    kind = type(tokenizer)
    call = kind.__call__

    def counted(self: Any, asked: Any, **options: Any) -> Any:
        sizes.append(1 if isinstance(asked, str) else len(asked))
        return call(self, asked, **options)

    monkeypatch.setattr(kind, "__call__", counted)

    def made() -> list[Any]:
        sizes.clear()
        encoder = ItemTextEncoder(spec, texts)
        encoder.load(torch.device("cpu"))
        bert, _ = load_sentence_encoder(spec)
        items = ItemTokens(pl.DataFrame({"title": texts}), ["title"], bert, 9)
        tokens = [ids.tolist() for ids in encoder._tokens]
        return [capped(texts, 6, tokenizer), tokens, items.ids.tolist()]

    whole = made()
    assert max(sizes) == 11
    monkeypatch.setattr("lightning_modules.llm.wording.AT_ONCE", 3)
    assert made() == whole
    assert max(sizes) == 3
