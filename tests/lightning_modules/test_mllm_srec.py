"""MLLM-SRec's recommender: its prompt, profiles that see no target, steps told and written, probes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from datamodules.types import CATALOG_SCHEMA
from lightning_modules.llm.label_scoring import NO_LOSS
from lightning_modules.llm.random_vision import RandomVisionModel
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec, VisionSpec
from lightning_modules.mllm_srec import MLLMSRecModule, ReasonsInOneModule
from lightning_modules.mllm_srec.profiles import Profiles
from tests.lightning_modules.mllm_msr_data import (
    CANDIDATES,
    CATALOG,
    HISTORIES,
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

KINDS = [["Film", "Crime"], ["Film", "Sea", "Crime"], ["Film", "Sea"], ["Film"], None]
SEEN = ["colour: grey", None, "colour: blue", "colour: red", "colour: green"]
SUMS = ["A grey heist.", "Teeth.", "Long.", None, "A green house."]
STEPS = CATALOG.with_columns(picture=pl.Series(SEEN), fusion=pl.Series(SUMS))
USERS = pl.DataFrame({
    "user_id": ["x", "y"], "age": [24, None], "occupation": ["student", "miner"],
    "zip": ["1", "2"],
})  # fmt: skip
BEHIND = "\n\n### Response:\n"


def with_kinds(kinds: list[Any]) -> pl.DataFrame:
    return CATALOG.with_columns(pl.Series("categories", kinds, dtype=CATALOG_SCHEMA["categories"]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["llama"](tmp_path_factory.mktemp("llm"), longest=2 * LONGEST)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A table as a stage that summarises users writes it."""
    columns = dict(zip(("user", "start", "stop"), (c.tolist() for c in STRETCHES), strict=True))
    pl.DataFrame({**columns, "text": LIKES}).write_parquet(tmp_path / "predictions.parquet")
    return str(tmp_path / "predictions.parquet")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path) -> Callable[..., Any]:
    """A module as a trainer would have it: attached to data and a device, its model loaded."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))

    def build(kind: type = MLLMSRecModule, catalog: Any = STEPS, **options: Any) -> Any:
        spec = BackboneSpec(
            str(llama), dtype="float32", chat_template=False, max_length=2 * LONGEST
        )
        adapter = options.pop("adapter", AdapterSpec(dropout=0.0))
        told = {"catalog": catalog, "item_words": WORDS, "user_facts": USERS}
        return attached(kind(llm=spec, adapter=adapter, **told, **options))

    return build


# The prompt ------------------------------------------------------------------------------------------


def test_a_prompt_has_the_papers_fields_in_order(made: Callable[..., Any], table: str) -> None:
    text = text_of(made(preferences=table, user_id=True), 0, 1)
    fields = [
        "whether they will like one more film.", "User: 1\n",
        "Profile: watched 3 films; age 24; occupation student\n",
        "What they like: tense films about crime, told slowly\n", 'One film: "Heat (1995)"\n',
        "Will they like it?" + BEHIND,
    ]  # fmt: skip
    places = [text.index(field) for field in fields]
    assert places == sorted(places)
    assert "1. " not in text
    assert "zip" not in text
    bare = text_of(made(preferences=table, profile=False), 0, 1)
    assert "Profile" not in bare
    assert "User:" not in bare


def test_without_preferences_the_history_is_listed_by_what_it_is_told_by(
    made: Callable[..., Any],
) -> None:
    module = made(history=("title", "picture"), years=False, max_length=2)
    assert "the oldest first: (1) Jaws; (2) A long 'quoted' title" in text_of(module, 0, 1)
    assert "all of many words" not in text_of(module, 0, 1)
    assert "many words. colour: blue\n" in text_of(module, 0, 1)
    assert "the oldest first: nothing so far\n" in text_of(module, 2, 1)


def test_nothing_that_is_written_is_told_of_an_image(made: Callable[..., Any]) -> None:
    module = made(told=False, chain=("picture",), history=("picture",))
    text = text_of(module, 0, 1)
    assert "Heat" not in text
    assert "One film\n2. What its picture shows: colour: grey\n3. Will they like it?" in text


@pytest.mark.parametrize("first", [False, True])
def test_told_steps_are_numbered_as_they_follow(
    made: Callable[..., Any], table: str, first: bool
) -> None:
    module = made(preferences=table, chain=("picture", "fusion"), candidate_first=first)
    text = text_of(module, 0, 1)
    user = "What they like: tense films about crime"
    seen, sum_ = "What its picture shows: colour: grey\n", "In short: A grey heist.\n"
    asked = "Will they like it?" + BEHIND
    lines = [seen, sum_, user, asked] if first else [user, seen, sum_, asked]
    places = [text.index(f"{number}. {line}") for number, line in enumerate(lines, start=1)]
    assert places == sorted(places)
    assert "In short: unknown\n" in text_of(module, 0, 4)  # no summary was written of it


def test_a_step_that_no_stage_has_written_is_refused(made: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"catalog\.fusion"):
        made(catalog=CATALOG, chain=("fusion",))
    with pytest.raises(ValueError, match="chain names colour"):
        made(chain=("colour",))
    with pytest.raises(ValueError, match="nothing to tell of a candidate"):
        made(told=False)


# Profiles --------------------------------------------------------------------------------------------


def test_a_profile_counts_what_a_history_holds() -> None:
    profiles = Profiles(WORDS, with_kinds(KINDS), USERS, ("age", "occupation"))
    # User 1: items 1, 2, 3; user 2: items 2, 1; nobody: none. Item 5 has no categories, so that not all
    # items are films.
    assert profiles(ROWS) == [
        "watched 3 films; mostly Film, Sea, Crime; age 24; occupation student",
        "watched 2 films; mostly Film, Crime, Sea; occupation miner",
        "watched 0 films; age 24; occupation student",
    ]
    shared = Profiles(WORDS, with_kinds([*KINDS[:4], ["Film"]]), USERS, ())
    assert shared(ROWS)[0] == "watched 3 films; mostly Sea, Crime"
    assert Profiles(WORDS, CATALOG, USERS, ("height",))(ROWS)[1] == "watched 2 films"
    one = replace(ROWS, stop=ROWS.start + 1)
    assert shared(one)[0] == "watched 1 film; mostly Crime"


def test_neither_target_nor_later_events_are_known_of_a_user(made: Callable[..., Any]) -> None:
    """User 1's later event, and what is asked about, are other ones: the user's part stays as it is."""
    module = made(catalog=STEPS.with_columns(with_kinds(KINDS)["categories"]))
    zeros = np.zeros(3, np.int64)
    before = module.user_texts(ROWS, zeros)
    items = HISTORIES.items.copy()
    items[[3, 6]] = 5  # those behind each row's history: the targets, had they been events
    other = replace(ROWS, histories=replace(HISTORIES, items=items), target=np.array([5, 5, 1]))
    assert module.user_texts(other, zeros) == before
    assert "mostly Film, Sea, Crime" in before[0]
    items[2] = 1
    other = replace(ROWS, histories=replace(HISTORIES, items=items))
    assert module.user_texts(other, zeros)[0] != before[0]


def test_long_preferences_leave_room_for_a_profile(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    columns = dict(zip(("user", "start", "stop"), (c.tolist() for c in STRETCHES), strict=True))
    texts = ["like this and that " * 500] * 3
    pl.DataFrame({**columns, "text": texts}).write_parquet(tmp_path / "long.parquet")
    kinds = with_kinds([[f"kind {i} of them all" for i in range(3)] for _ in range(4)] + [None])
    catalog = STEPS.with_columns(kinds["categories"])
    module = made(catalog=catalog, preferences=str(tmp_path / "long.parquet"), user_id=True)
    batch = labelled(module)
    assert batch.tokens.shape[1] <= 2 * LONGEST
    assert module.table.cut_events == 0
    assert "Profile: watched 3 films; mostly kind 0" in text_of(module, 0, 1)


# Probes ----------------------------------------------------------------------------------------------


def test_contradictory_text_is_anothers_beside_the_own_picture(
    made: Callable[..., Any], table: str
) -> None:
    options = {"preferences": table, "chain": ("picture", "fusion")}
    own, other = made(**options), made(texts="swapped", **options)
    zeros = np.zeros(3, np.int64)
    assert own.user_texts(ROWS, zeros) == other.user_texts(ROWS, zeros)
    assert sorted(own.names) == sorted(other.names)
    for i in range(5):
        assert other.names[i] != own.names[i]
        whose = own.names.index(other.names[i])
        assert other.notes["fusion"][i] == own.notes["fusion"][whose]
        assert other.notes["picture"][i] == own.notes["picture"][i]
    with pytest.raises(ValueError, match="texts=swapped needs two items"):
        made(texts="swapped", told=False, chain=("picture",))


class Drawn:
    """Pictures of four of five items."""

    mask = np.array([False, True, True, True, True, False])

    def picture(self, item: int) -> Image.Image:
        return Image.new("RGB", (40 + item, 40), (20 * item, 0, 0))

    def size(self, item: int) -> tuple[int, int]:
        return self.picture(item).size

    def digest(self, item: int) -> str:
        return f"{item:064x}"


def test_a_probe_of_pictures_changes_what_was_written_of_them() -> None:
    llm = VisionSpec(RandomVisionModel("llava_lite", 0), dtype="float32")
    chain = ("picture", "fusion")

    def build(pictures: str) -> Any:
        return MLLMSRecModule(
            STEPS, WORDS, USERS, llm, AdapterSpec(), item_images=Drawn(), chain=chain,
            pictures=pictures,
        )  # fmt: skip

    own, swapped, blank = (build(which) for which in ("own", "swapped", "blank"))
    assert own.notes == {"picture": [t or "" for t in SEEN], "fusion": [t or "" for t in SUMS]}
    for i in range(4):
        whose = int(swapped.shown.of[i + 1]) - 1
        assert whose != i
        assert {step: swapped.notes[step][i] for step in chain} == {
            step: own.notes[step][whose] for step in chain
        }
        assert [blank.notes[step][i] for step in chain] == ["", ""]
        assert swapped.shown.digest(i + 1) == Drawn().digest(whose + 1)
        assert blank.shown.digest(i + 1) not in (own.shown.digest(i + 1), "")
    for probe in (swapped, blank):
        assert probe.names == own.names
        assert [probe.notes[step][4] for step in chain] == ["colour: green", "A green house."]


# The steps in one prompt -----------------------------------------------------------------------------


def in_one(made: Callable[..., Any], **options: Any) -> Any:
    given = {"chain": ("picture", "fusion"), "reasoning_tokens": 100, **options}
    return made(ReasonsInOneModule, **given)


def test_the_steps_in_one_prompt_are_asked_for_and_not_told(
    made: Callable[..., Any], table: str
) -> None:
    module = in_one(made, preferences=table)
    text = text_of(module, 0, 1)
    assert "colour: grey" not in text
    assert "heist" not in text
    assert "tense films" not in text
    assert 'One film: "Heat (1995)"\nWill they like it? Write these lines' in text
    lines = (
        "\n1. What its picture shows: ...\n2. In short: ...\n3. What they like: ...\n4. Yes. or No."
    )
    assert lines + BEHIND in text
    without = text_of(in_one(made), 0, 1)
    assert "\n2. In short: ...\n3. Yes. or No." in without


def test_a_fit_is_taught_what_the_stages_wrote(made: Callable[..., Any], table: str) -> None:
    module = in_one(made, preferences=table, reasoning_tokens=200)
    batch = labelled(module)
    prompt = text_of(module, 0, 4)  # row 0 asks about item 4
    said = (
        "1. What its picture shows: colour: red\n2. In short: unknown\n"
        "3. What they like: tense films about crime, told slowly"
    )
    closing = "\n4. Will they like it (Yes. or No.)?\n"
    read = module.tokenizer.decode(batch.tokens[0][batch.token_mask[0].bool()])
    whole = module.tokenizer(prompt + said + closing)["input_ids"]
    assert read == module.tokenizer.decode(whole)
    foretold = batch.answers[0][batch.answers[0] != NO_LOSS]
    told = module.tokenizer.decode(foretold)
    assert told.strip() == (said + closing).removeprefix("1. What its picture shows:").strip()
    assert batch.answers[0, -1] == NO_LOSS
    kept = len(batch.answers[0])
    assert batch.tokens[0, -kept + 1 :].tolist() == batch.answers[0, :-1].tolist()


@torch.no_grad()
def test_the_loss_is_the_margins_and_the_mean_of_the_lines(
    made: Callable[..., Any], table: str
) -> None:
    module = in_one(made, preferences=table)
    batch = labelled(module)
    got = module._row_losses(batch)
    for row in range(3):
        ids = batch.tokens[row][batch.token_mask[row].bool()]
        logits = module.model(ids[None]).logits[0]
        labels = module.answer_tokens
        margin = float(logits[-1, labels.first] - logits[-1, labels.second])
        answered = math.log1p(math.exp(-margin if batch.label[row] else margin))
        lines = batch.answers[row][batch.answers[row] != NO_LOSS]
        written = F.cross_entropy(logits[-len(lines) - 1 : -1], lines)
        assert float(got[row]) == pytest.approx(answered + float(written), abs=1e-4)


def written_text(module: Any, text: str) -> None:
    """Have the model write a text behind every prompt."""
    ids = module.tokenizer(text, add_special_tokens=False)["input_ids"]
    module.write = lambda prompts, *_, **__: [list(ids) for _ in prompts]


@torch.no_grad()
def test_an_answer_is_read_behind_what_was_written(made: Callable[..., Any], table: str) -> None:
    """One prompt at a time through the model alone, the last line cut off and the question put again."""
    module = in_one(made, preferences=table)
    written_text(module, " a car\n2. In short: a heist\n4. Yes. Yes. Yes.")
    batch = ranked(module)
    _, scores = module.rank(batch)
    response = " a car\n2. In short: a heist"
    for row in range(3):
        for column, item in enumerate(CANDIDATES[row].tolist()):
            if not item:
                continue
            asked = text_of(module, row, item) + "1. What its picture shows:"
            parts = [asked, response, module.prompt.closing()]
            ids = module.tokenizer(parts[0])["input_ids"]
            for part in parts[1:]:
                ids += module.tokenizer(part, add_special_tokens=False)["input_ids"]
            logits = module.model(torch.tensor([ids])).logits[0, -1]
            labels = module.answer_tokens
            assert not labels.shared
            expected = float(logits[labels.first] - logits[labels.second])
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-4)


def test_no_mark_that_was_written_is_read(made: Callable[..., Any]) -> None:
    module = in_one(made)
    ids = module.tokenizer(" a car", add_special_tokens=False)["input_ids"]
    end = module.tokenizer.eos_token_id
    assert module._reasons([*ids, end, *ids]) == [*ids, *ids]
    assert module._reasons([]) == []


@torch.no_grad()
def test_labelled_rows_are_asked_behind_their_own_reasons(
    made: Callable[..., Any], table: str
) -> None:
    module = in_one(made, preferences=table, reasoning_tokens=8)
    rows = labelled(module, training=False)
    alone = module.score(module.encode(rows), torch.tensor(ROWS.target)[:, None])[:, 0]
    batch = ranked(module, np.array(ROWS.target, np.int32)[:, None])
    together = module.score(module.encode(batch), torch.tensor(ROWS.target)[:, None])[:, 0]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    assert module.generations.fresh


def test_a_fits_validation_reads_no_text_of_earlier_weights(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = in_one(made, reasoning_tokens=4)
    monkeypatch.setattr(MLLMSRecModule, "on_validation_epoch_start", lambda self: None)
    with torch.no_grad():
        module.encode(labelled(module, training=False))
    assert module.generations.known
    module.on_validation_epoch_start()
    assert not module.generations.known


def test_without_steps_it_is_answered_at_once(made: Callable[..., Any]) -> None:
    module, plain = in_one(made, chain=()), made(chain=None)
    assert module.untrainable(None) is None
    with torch.no_grad():
        got, expected = module.rank(ranked(module))[1], plain.rank(ranked(plain))[1]
    torch.testing.assert_close(got, expected)
    assert not module.generations.known


def test_what_cannot_reason_is_refused(made: Callable[..., Any]) -> None:
    for options, match in (
        ({"chain": None}, "chain is null"), ({"loss": "answer"}, "loss=margin"),
        ({"reasoning_tokens": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            in_one(made, **options)


# Settings --------------------------------------------------------------------------------------------


def test_the_tuned_model_alone_is_quantized(llama: Path) -> None:
    spec = BackboneSpec(str(llama), dtype="float32", chat_template=False)
    given = {"catalog": STEPS, "item_words": WORDS, "user_facts": USERS, "adapter": AdapterSpec()}
    assert MLLMSRecModule(llm=spec, **given).llm == spec
    tuned = MLLMSRecModule(llm=spec, quantization="nf4-dq", **given)
    assert tuned.llm == replace(spec, quantization="nf4-dq")
    assert tuned.precision_plugin("cpu", "auto") is not None
    assert spec.quantization is None
