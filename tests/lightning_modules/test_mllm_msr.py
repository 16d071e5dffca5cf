"""MLLM-MSR's recommender: its prompts' parts, one prefix for all candidates, preferences from a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_modules.errors import ModelError
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.mllm_msr import MLLMMSRModule
from lightning_modules.mllm_msr.prompts import PairPrompt
from tests.lightning_modules.mllm_msr_data import (
    CANDIDATES,
    CATALOG,
    LIKES,
    LONGEST,
    ROWS,
    STRETCHES,
    WORDS,
    attached,
    labelled,
    ranked,
    text_of,
)
from tests.lightning_modules.tiny_llm import TINY


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY[request.param](tmp_path_factory.mktemp("llm"), longest=LONGEST)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["llama"](tmp_path_factory.mktemp("llm"), longest=LONGEST)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    """A table as a stage that summarises users writes it."""

    def write(texts: list[str | None] = LIKES, name: str = "predictions") -> str:
        user, start, stop = (column.tolist() for column in STRETCHES)
        steps = [[text] if text else [] for text in texts]
        columns = {"user": user, "start": start, "stop": stop, "text": texts, "steps": steps}
        pl.DataFrame(columns).write_parquet(tmp_path / f"{name}.parquet")
        return str(tmp_path / f"{name}.parquet")

    return write


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A module as a trainer would have it: attached to data and a device, its model loaded."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))

    def build(llm: Path, longest: int = LONGEST, chat: bool = False, **options: Any) -> Any:
        spec = BackboneSpec(str(llm), dtype="float32", chat_template=chat, max_length=longest)
        adapter = options.pop("adapter", AdapterSpec(dropout=0.0))
        module = MLLMMSRModule(CATALOG, WORDS, spec, adapter, **options)
        return attached(module)

    return build


@torch.no_grad()
def naive_margin(plain: Any, module: Any, row: int, item: int) -> float:
    """The definition: a whole prompt alone through plain transformers, and two logits behind it.

    Both labels begin with the same token in none of the tiny tokenizers.
    """
    special = not module.llm.chat_template

    def ids(text: str) -> list[int]:
        return list(module.tokenizer(text, add_special_tokens=special)["input_ids"])

    text = text_of(module, row, item)
    asked, yes, no = ids(text), ids(text + "Yes."), ids(text + "No.")
    logits = plain(torch.tensor([asked])).logits[0, -1]
    return float(logits[yes[len(asked)]] - logits[no[len(asked)]])


# Prompts ---------------------------------------------------------------------------------------------


def test_a_prompt_tells_taste_before_the_candidate(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    module = made(llama, preferences=table(), fields=("description",))
    text = text_of(module, 0, 1)
    assert text.index("What they like: tense films about crime") < text.index(
        'One film: "Heat (1995)"'
    )
    assert '"Heat (1995)"\nAbout it: Cops.\nWill they watch it next?' in text
    other = made(llama, preferences=table(), candidate_first=True)
    text = text_of(other, 0, 1)
    assert text.index('One film: "Heat (1995)"') < text.index("What they like: tense films")
    assert "Will they watch it next?\n\n### Response:\n" in text
    assert "nothing is known of them" in text_of(module, 2, 1)


def test_without_preferences_the_newest_titles_are_listed(
    made: Callable[..., Any], llama: Path
) -> None:
    module = made(llama, max_length=2, years=False)
    assert 'the oldest first: "Jaws", "A long \'quoted\'' in text_of(module, 0, 1)
    assert 'the oldest first: "Jaws", "Heat"\n' in text_of(module, 1, 3)
    assert "the oldest first: nothing so far" in text_of(module, 2, 1)


def test_the_words_of_others_end_nothing(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    module = made(llama, preferences=table(), chat=True)
    text = text_of(module, 1, 3)
    assert "What they like: ships and 'sharks' Yes.\n" in text
    assert text.count("</s>") == 1
    assert text.endswith("</s><|assistant|>")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_parts_are_the_tokens_of_the_whole_prompt(
    made: Callable[..., Any], folder: Path, table: Callable[..., str], first: bool, chat: bool
) -> None:
    if chat and "chat_template" not in (folder / "tokenizer_config.json").read_text():
        chat = (folder / "chat_template.jinja").is_file()
    options = {"fields": ("description",), "candidate_first": first, "chat": chat}
    for module in (made(folder, preferences=table(), **options), made(folder, **options)):
        module.row_lengths(ROWS)
        rows = ((row, item) for row in range(3) for item in range(1, 6))
        users = module.table.user_parts(ROWS)
        for row, item in rows:
            expected = module.tokenizer(text_of(module, row, item), add_special_tokens=not chat)
            assert module.table.whole(users[row], item).tolist() == expected["input_ids"]


# Scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
def test_scores_are_those_of_one_prompt_at_a_time(
    made: Callable[..., Any], folder: Path, table: Callable[..., str], first: bool
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    module = made(folder, preferences=table(), fields=("description",), candidate_first=first)
    assert module.shares_users == (not first)
    batch = ranked(module)
    assert int(batch.token_mask.sum(1).min()) < batch.tokens.shape[1]  # rows of unequal lengths
    with torch.no_grad():
        counts, scores = module.rank(batch)
        state = module.encode(batch)
        every = module.score(state, torch.arange(1, 6))  # the same items for all rows
    expected = np.array(
        [
            [naive_margin(plain, module, r, i) if i else -np.inf for i in CANDIDATES[r]]
            for r in range(3)
        ]
    )
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-4)
    for row in range(3):
        own = dict(zip(CANDIDATES[row].tolist(), scores[row].tolist(), strict=True))
        for item, score in enumerate(every[row].tolist(), start=1):
            assert score == pytest.approx(own.get(item, score), abs=1e-5)
    own = scores.gather(
        1, torch.tensor(ROWS.target[:, None] == CANDIDATES).int().argmax(1)[:, None]
    )
    assert counts.above.tolist() == (scores > own).sum(1).tolist()
    assert counts.count.tolist() == [4, 3, 4]


def test_a_users_part_is_read_once(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    module = made(llama, preferences=table())
    batch = ranked(module)
    read: list[int] = []
    module.model.register_forward_pre_hook(
        lambda model, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        module.rank(batch)
    assert len(read) == 2
    assert read[0] == batch.tokens.shape[1]
    lengths = [[len(module.items.of(i)) for i in row] for row in CANDIDATES]
    longest = np.sort(np.array(lengths), axis=1).max(0)
    assert read[1] <= longest.sum() + 1  # a row's padding is one token


def test_the_order_of_candidates_changes_no_score(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    module = made(llama, preferences=table())
    with torch.no_grad():
        _, scores = module.rank(ranked(module))
        _, turned = module.rank(ranked(module, CANDIDATES[:, ::-1].copy()))
    torch.testing.assert_close(turned.flip(1), scores, atol=1e-5, rtol=0)


def test_an_adapter_of_virtual_tokens_is_scored_one_by_one(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    adapter = AdapterSpec("prompt", num_virtual_tokens=4)
    module = made(llama, preferences=table(), adapter=adapter)
    assert not module.shares_users
    with torch.no_grad():
        _, scores = module.rank(ranked(module))
        alone = module.margins(labelled(module, training=False))  # of the targets
    found = scores[
        torch.arange(3), torch.from_numpy(ROWS.target[:, None] == CANDIDATES).int().argmax(1)
    ]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


# Training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
def test_the_loss_is_on_the_answer_alone(
    made: Callable[..., Any], folder: Path, table: Callable[..., str], first: bool
) -> None:
    """Nothing of the prompt carries a loss, and the label's ids are those behind it."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    targets = list(enumerate(ROWS.target.tolist()))
    module = made(folder, preferences=table(), candidate_first=first)
    margins = torch.tensor([naive_margin(plain, module, *pair) for pair in targets])
    expected = F.binary_cross_entropy_with_logits(margins, torch.tensor(ROWS.label).float())
    assert module.training_step(labelled(module), 0).item() == pytest.approx(
        expected.item(), abs=1e-5
    )
    module = made(folder, preferences=table(), candidate_first=first, loss="answer")
    batch = labelled(module)
    ends = [list(full) for full in module.answer_tokens.full]
    for row, liked in enumerate(ROWS.label.tolist()):
        said = [i for i in batch.answers[row].tolist() if i != -100]
        assert said == ends[0 if liked else 1]
    total = 0.0
    for (row, item), liked in zip(targets, ROWS.label.tolist(), strict=True):
        text = text_of(module, row, item)
        whole = module.tokenizer(text + ("Yes." if liked else "No."))["input_ids"]
        answers = torch.tensor([whole])
        answers[:, : len(module.tokenizer(text)["input_ids"])] = -100
        total += plain(torch.tensor([whole]), labels=answers).loss.item() / 3
    assert module.training_step(batch, 0).item() == pytest.approx(total, abs=1e-5)


def test_labels_are_balanced_and_only_the_adapter_learns(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    module = made(llama, preferences=table())
    module.training_step(labelled(module), 0).backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    moved = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name in trained if "lora_B" in name}  # A's, once B is not zero


def test_a_long_taste_loses_its_last_words_and_no_prompt_its_label(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    long = " ".join(f"word{i}" for i in range(400))
    path = table([long, "ships", None])
    module = made(llama, longest=400, preferences=path, fields=("description",), text_tokens=70)
    lengths = module.row_lengths(ROWS)
    batch = labelled(module)
    longest = int(module.items.lengths.max()) + module.answer_room()
    assert (lengths <= 400 - module.answer_room()).all()
    assert len(module.table.user_parts(ROWS)[0]) > 400 - longest - 8  # what fits is told
    assert "word0 word1 word2" in text_of(module, 0, 4)
    assert "word399" not in text_of(module, 0, 4)
    for row, ids in enumerate(batch.tokens):
        text = module.tokenizer.decode(ids[batch.token_mask[row].bool()])
        assert text.endswith("Will they watch it next?\n\n### Response:\n")
    assert "1 preferences lost their last words" in " ".join(module.remarks())
    plot = module.item_texts.parts[3]
    assert plot.count("A shark.") < 40
    about = module.tokenizer(plot[plot.index("About it: ") :], add_special_tokens=False)
    assert len(about["input_ids"]) <= 70 + 30
    with pytest.raises(ModelError, match="leaves a preference no token beside a candidate"):
        made(llama, longest=280, preferences=path, fields=("description",)).row_lengths(ROWS)


def test_a_long_history_loses_its_oldest_titles(made: Callable[..., Any], llama: Path) -> None:
    whole = made(llama)
    whole.row_lengths(ROWS)
    users = [len(part) for part in whole.table.user_parts(ROWS)]
    longest = int(whole.items.lengths.max()) + whole.answer_room()
    module = made(llama, longest=longest + users[0] - 1)
    module.row_lengths(ROWS)
    assert module.table.cut_events >= 1
    shown = module.tokenizer.decode(module.table.user_parts(ROWS)[0])
    assert "Heat" not in shown
    assert "A long" in shown


# Preferences -----------------------------------------------------------------------------------------


def test_rows_without_a_preference_are_refused(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    module = made(llama, preferences=table())
    other = replace(ROWS, stop=np.array([3, 5, 0]))
    with pytest.raises(
        ModelError, match="no text for 1 of 3 rows, such as user 2 with the events 4 to 4"
    ):
        module.row_lengths(other)


def test_a_table_of_something_else_is_refused(
    made: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    pl.DataFrame({"item": [1], "text": ["x"]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(
        ValueError, match=r"has no column user or start or stop: name predictions\.parquet"
    ):
        made(llama, preferences=str(tmp_path / "items.parquet"))
    twice = pl.DataFrame({"user": [1, 1], "start": [0, 0], "stop": [3, 3], "text": ["x", "y"]})
    twice.write_parquet(tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="several texts of one user's stretch"):
        made(llama, preferences=str(tmp_path / "twice.parquet"))
    whole = (tmp_path / "twice.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.parquet cannot be read .*: delete its folder"):
        made(llama, preferences=str(tmp_path / "cut.parquet"))


def test_other_preferences_are_other_prompts(
    made: Callable[..., Any], llama: Path, table: Callable[..., str]
) -> None:
    """Tokens on disk are named by what was told, so that a changed table is read anew."""
    module = made(llama, preferences=table())
    first = [part.tolist() for part in labelled(module).tokens]
    other = made(llama, preferences=table(["calm films", *LIKES[1:]], "other"))
    assert module.wording() != other.wording()
    assert [part.tolist() for part in labelled(other).tokens] != first
    assert made(llama, preferences=table()).wording() == module.wording()


@pytest.mark.parametrize("way", ["history", "preference"])
def test_users_who_are_told_otherwise_are_kept_by_another_name(
    made: Callable[..., Any], llama: Path, table: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch, way: str,
) -> None:  # fmt: skip
    given = {"preferences": table()} if way == "preference" else {}
    before = made(llama, **given).wording()
    known = getattr(PairPrompt, way)
    monkeypatch.setattr(
        PairPrompt, way, lambda self, told: known(self, told) + ("." if len(told) > 1 else "")
    )
    assert made(llama, **given).wording() != before
