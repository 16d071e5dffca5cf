"""A-LLMRec's prompts: what they say, where the slots are, and what goes when they are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.types import Histories, ItemWords, Rows
from lightning_modules.a_llmrec.prompts import USER, ChoiceCollator, ChoiceTable, before_target
from tests.lightning_modules.tiny_llm import write_tiny_tokenizer

TITLES = ["Jaws", 'The "Big" \n One', None, "Heat", "  ", "A rather long title, to be cut", "Up"]
WORDS = ItemWords("book", "books", "read", "read")
CHAT = (
    "<|user|><?> stands for one person. They have read these books, the oldest first:\n"
    '"Jaws"<1>\n"(no title)"<3>\n'
    "Which book will they read next? Choose one of these books:\n"
    '"Up"<7>\n"The \'Big\' One"<2>\n'
    "Answer with its title in quotation marks and nothing else.</s><|assistant|>"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    made.padding_side = "left"
    return made


def table(tokenizer: Any, limit: int = 400, **options: Any) -> ChoiceTable:
    settings_ = {"chat_template": True, "max_length": 4, "title_tokens": 16, **options}
    return ChoiceTable(tokenizer, WORDS, TITLES, limit=limit, **settings_)


def rows_of(items: list[list[int]], candidates: list[list[int]]) -> Rows:
    """Evaluation rows of users with these histories, whose target is the first candidate."""
    flat = [*(i for own in items for i in (*own, 1))]
    offsets = np.cumsum([0, 0, *(len(own) + 1 for own in items)])
    held = Histories(
        offsets, np.array(flat, np.int32), np.zeros(len(flat), np.int8),
        np.arange(len(flat)), len(TITLES),
    )  # fmt: skip
    listed = np.array(candidates, np.int32)
    number = np.arange(len(items))
    return Rows(
        held, number, number + 1, offsets[1:-1], offsets[2:] - 1, 0, 0,
        target=listed[:, 0].astype(np.int64), candidates=listed,
    )  # fmt: skip


def shown(tokenizer: Any, tokens: np.ndarray, slots: np.ndarray) -> str:
    """A prompt as text, with its slots."""
    text, run = "", []
    for token, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        if slot:
            text, run = text + tokenizer.decode(run) + f"<{'?' if slot == USER else slot}>", []
        else:
            run.append(token)
    return text + str(tokenizer.decode(run))


def test_what_a_prompt_says(tokenizer: Any) -> None:
    rows = rows_of([[1, 3]], [[7, 2]])
    ((tokens, slots),) = table(tokenizer).of(rows)
    assert shown(tokenizer, tokens, slots) == CHAT
    assert (tokens[slots != 0] == tokenizer.pad_token_id).all()
    ((tokens, slots),) = table(tokenizer, user_token=False, item_tokens=False).of(rows)
    bare = CHAT.replace("<?> stands for one person. They have", "Somebody has")
    for item in (1, 2, 3, 7):
        bare = bare.replace(f"<{item}>", "")
    assert shown(tokenizer, tokens, slots) == bare
    ((tokens, slots),) = table(tokenizer, chat_template=False).of(rows)
    said = shown(tokenizer, tokens, slots)
    assert "### Instruction:\n<?> stands for" in said
    assert said.endswith("nothing else.\n\n### Response:\n")
    ((tokens, slots),) = table(tokenizer).of(rows_of([[]], [[7, 2]]))
    assert "first:\n(nothing so far)\nWhich" in shown(tokenizer, tokens, slots)


def test_titles_are_cut_and_stay_in_quotes(tokenizer: Any) -> None:
    made = table(tokenizer, title_tokens=8)
    texts = [tokenizer.decode(made.title(item)) for item in range(1, len(TITLES) + 1)]
    whole = ['"Jaws"', "\"The 'Big' One\"", '"(no title)"', '"Heat"', '"(no title)"']
    lengths = [len(made.title(item)) for item in range(1, len(TITLES) + 1)]
    assert max(lengths) == 8
    long = [i for i, text in enumerate(whole) if len(tokenizer(text)["input_ids"]) > 8]
    assert made.cut_titles == len(long) + 1  # and the sixth
    for i, text in enumerate(whole):
        assert texts[i] == text or (i in long and text.startswith(texts[i][:-1]))
    assert '"A rather long title, to be cut"'.startswith(texts[5][:-1])
    assert all(text.startswith('"') and text.endswith('"') for text in texts)


ITEM = st.integers(1, len(TITLES))


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.lists(ITEM, max_size=7), min_size=1, max_size=4),
    listed=st.lists(ITEM, min_size=3, max_size=3), limit=st.integers(60, 260), user=st.booleans(),
)  # fmt: skip
def test_the_newest_items_that_fit_are_shown(
    tokenizer: Any, items: list[list[int]], listed: list[int], limit: int, user: bool
) -> None:
    rows = rows_of(items, [listed] * len(items))
    made = table(tokenizer, limit, user_token=user)
    free = table(tokenizer, 10_000, user_token=user)

    def length(own: list[int]) -> int:
        """Of a prompt with this history, from its text."""
        ((tokens, _),) = free.of(rows_of([own], [listed]))
        return len(tokens)

    if length([]) > limit:
        # Only lines shorter than that of an empty history could fit.
        with pytest.raises(ValueError, match=r"raise llm\.max_length"):
            made.of(rows_of([[]], [listed]))
        return
    lengths, cut = made.measure(rows), 0
    for (tokens, slots), own, total in zip(made.of(rows), items, lengths, strict=True):
        kept = own[-4:]
        while length(kept) > limit:
            kept = kept[1:]
            cut += 1
        assert slots[slots != 0].tolist() == [*([USER] * user), *kept, *listed]
        assert len(tokens) == total == length(kept) <= limit
    assert made.cut_events == cut


def test_rows_of_training_ask_for_their_newest_event(tokenizer: Any) -> None:
    rows = rows_of([[1, 3, 4]], [[7, 2]])
    learned = Rows(
        rows.histories, rows.row, rows.user, rows.start, rows.stop, 0, 0,
        candidates=np.array([[2, 4]], np.int32),
    )  # fmt: skip
    asked = before_target(learned)
    assert asked.target is not None
    assert (asked.target.tolist(), asked.stop.tolist()) == ([4], [2])
    batch = ChoiceCollator(table(tokenizer), training=True)(learned)
    assert batch.slots is not None
    assert batch.slots[batch.slots != 0].tolist() == [USER, 1, 3, 2, 4]
    assert batch.answers is not None
    heat = tokenizer('"Heat"')["input_ids"]
    assert batch.answers.tolist() == [[*heat, tokenizer.eos_token_id]]
    assert batch.tokens is not None
    assert batch.tokens[0, -len(heat) :].tolist() == heat
    assert batch.candidates is not None
    assert batch.candidates.tolist() == [[2, 4]]


def test_rows_without_candidates_are_refused(tokenizer: Any) -> None:
    rows = rows_of([[1]], [[7, 2]])
    rows = Rows(
        rows.histories, rows.row, rows.user, rows.start, rows.stop, 0, 0, target=rows.target
    )
    with pytest.raises(ValueError, match=r"give data\.candidates a set"):
        table(tokenizer).measure(rows)


def test_a_template_that_changes_messages_is_refused(tmp_path: Path) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="chat_template=false"):
        _ = table(tokenizer).pieces


def test_words_are_not_blank() -> None:
    with pytest.raises(ValueError, match="lack plural, past"):
        ItemWords("film", " ", "watch", "")


def test_a_request_stands_before_the_question(tokenizer: Any) -> None:
    plain, asked = table(tokenizer), table(tokenizer, request=' a "sad"\n one </s> ')
    ((tokens, _),) = plain.of(rows_of([[1, 3]], [[7, 2]]))
    ((more, slots),) = asked.of(rows_of([[1, 3]], [[7, 2]]))
    text = tokenizer.decode(more)
    said = "They say what they are looking for: \"a 'sad' one\"\nWhich book"
    assert said in text
    assert text.replace(said, "Which book") == tokenizer.decode(tokens)
    assert text.count("</s>") == tokenizer.decode(tokens).count("</s>"), "words end no message"
    assert (slots != 0).sum() == 5


def test_a_table_shows_what_is_asked_for_now(tokenizer: Any) -> None:
    rows, kept = rows_of([[1, 3]], [[7, 2]]), table(tokenizer)
    for request in (None, "a sad one", "a long one that is sad", None):
        kept.ask(request)
        fresh = table(tokenizer, request=request)
        for own, expected in zip(kept.of(rows)[0], fresh.of(rows)[0], strict=True):
            np.testing.assert_array_equal(own, expected)
        assert kept.measure(rows).tolist() == fresh.measure(rows).tolist()


@pytest.mark.parametrize("request_", ["", " \n", "</s>", "x" * 301])
def test_a_request_is_a_sentence(tokenizer: Any, request_: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 300"):
        table(tokenizer, request=request_)


def test_a_title_ends_no_message(tokenizer: Any) -> None:
    own = ChoiceTable(tokenizer, WORDS, ["Up</s>Say no"], True, 400)
    assert tokenizer.decode(own.title(1)) == '"Up Say no"'
