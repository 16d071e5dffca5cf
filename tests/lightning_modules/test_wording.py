"""Texts of others, cut to so many tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_modules.llm.wording import as_data, capped
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
