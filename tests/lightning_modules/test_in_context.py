"""TALLRec without training: shown examples, reasons before the answer, and lists, with a tiny model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from datamodules.examples import ExampleTable, SlidingWindows
from datamodules.loading import AttachLabels, AttachTargets
from datamodules.movielens import MovieLensDataModule
from datamodules.types import TEST, TRAIN, VALID, EvalRows, Histories, Rows
from lightning_modules.llm.generation import plain
from lightning_modules.llm.layouts import lay_out_shown
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.tallrec import (
    ChainOfThoughtModule,
    FewShotModule,
    ListPrompt,
    ListwiseModule,
    WrittenAnswerModule,
    prompts,
)  # fmt: skip
from lightning_modules.tallrec.few_shot import balanced_draw
from lightning_modules.tallrec.listwise import candidate_lists, implied_scores, named_items
from lightning_modules.tallrec.reasoning import THEREFORE, said_yes
from tests.lightning_modules.tiny_llm import write_tiny_llm, write_tiny_tokenizer

LONGEST = 1024
TITLES = [f"Film {i}" for i in range(1, 9)]
RATINGS = np.array([5, 2, 4, 1, 5, 4, 1, 2, 3, 5, 4, 1, 5, 2, 4, 1], np.float32)
HISTORIES = Histories(
    offsets=np.array([0, 0, 8, 16]),
    items=np.array([*range(1, 9), *range(8, 0, -1)], np.int32),
    split=np.full(16, TRAIN, np.int8),
    timestamps=np.arange(16),
    num_items=8,
    ratings=RATINGS,
)


def table(user: list[int], stop: list[int], code: int) -> ExampleTable:
    """Windows of two events."""
    places = np.array(stop)
    return ExampleTable(
        np.array(user), places - 2, places, HISTORIES.items[places].astype(np.int64),
        RATINGS[places] > 3, np.full(len(stop), code, np.int8),
    )  # fmt: skip


TRAINING = table([1, 1, 2, 2], [2, 3, 10, 11], TRAIN)  # likes, dislikes, likes, dislikes
TESTED = table([1, 2, 1, 1, 2], [6, 13, 4, 5, 14], TEST)
HELD_OUT = EvalRows(
    TESTED.user, TESTED.stop, TESTED.target, np.ones((5, 1), bool), ("all",), np.ones(5),
    label=TESTED.label, start=TESTED.start,
)  # fmt: skip
ROWS = Rows(
    HISTORIES, np.arange(5), TESTED.user, TESTED.start, TESTED.stop, 0, 0,
    target=TESTED.target, label=TESTED.label, liked_above=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=LONGEST)


@pytest.fixture
def made(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A module as a trainer would have it; the data knows its training examples and its test rows."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))

    def build(kind: type, **options: Any) -> Any:
        spec = BackboneSpec(
            str(folder), dtype="float32",
            chat_template=options.pop("chat", False), max_length=LONGEST,
        )  # fmt: skip
        catalog = pl.DataFrame({"title": TITLES, "brand": [None] * len(TITLES)})
        module = kind(catalog=catalog, llm=spec, adapter=AdapterSpec("none"), **options)
        data = SimpleNamespace(
            seed=0, histories=HISTORIES, liked_above=3, test_code=TEST,
            prepared=SimpleNamespace(digest="x", examples=lambda: TRAINING),
            rows=lambda code: HELD_OUT if code == TEST else None,
        )  # fmt: skip
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(datamodule=data, strategy=strategy, precision_plugin=None)
        monkeypatch.setattr(kind, "trainer", trainer)
        module.configure_model()
        return module

    return build


def batch_of(module: Any) -> Any:
    module.row_lengths(ROWS)
    collate = AttachTargets(module.collator(training=False), HELD_OUT, mask_seen=True)
    return AttachLabels(collate)(ROWS)


def margin_by_hand(module: Any, folder: Path, text: str) -> float:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = plain(torch.tensor([module.tokenizer(text)["input_ids"]])).logits[0, -1]
    yes, no = (module.tokenizer("\n" + w)["input_ids"][-1] for w in ("Yes", "No"))
    return (logits[yes] - logits[no]).item()


@pytest.mark.parametrize("kind", [FewShotModule, ChainOfThoughtModule, ListwiseModule])
def test_lists_that_are_written_otherwise_are_kept_by_another_name(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    before = made(kind).wording()
    assert made(kind).wording() == before
    with monkeypatch.context() as edited:
        edited.setattr(prompts, "_listed", lambda items: "; ".join(items) or "nothing so far")
        assert made(kind).wording() != before
    known = ListPrompt.listing
    monkeypatch.setattr(
        ListPrompt, "listing", lambda *given: known(*given).replace("\n2. ", "\n2) ")
    )
    assert (made(kind).wording() != before) == (kind is ListwiseModule)


# ---------------------------------------------------------------- shown examples


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 5), st.integers(-3, 9))
def test_a_draw_is_balanced_or_refused(labels: list[bool], seed: int, count: int) -> None:
    found = np.array(labels, dtype=bool)
    possible = min(sum(labels), len(labels) - sum(labels)) * 2
    if count < 2 or count % 2 or count > possible:
        with pytest.raises(ValueError, match=r"must be even|of each label"):
            balanced_draw(found, count, seed)
        return
    drawn = balanced_draw(found, count, seed)
    assert len(set(drawn.tolist())) == count
    assert found[drawn].sum() * 2 == count
    assert np.array_equal(drawn, balanced_draw(found, count, seed))


def test_seeds_draw_other_examples_in_other_orders() -> None:
    labels = np.arange(40) % 2 == 0
    assert len({tuple(balanced_draw(labels, 4, seed)) for seed in range(20)}) == 20
    assert len({tuple(labels[balanced_draw(labels, 4, seed)]) for seed in range(40)}) > 2


@pytest.mark.parametrize("chat", [False, True])
@torch.no_grad()
def test_shown_examples_stand_before_the_question(
    chat: bool, made: Callable[..., Any], folder: Path
) -> None:
    module = made(FewShotModule, demonstrations=2, seed=3, chat=chat)
    rows = module.drawn_rows()
    assert sorted(rows.label.tolist()) == [False, True]
    kept = {(int(s), int(t)) for s, t in zip(TRAINING.stop, TRAINING.target, strict=True)}
    assert {(int(s), int(t)) for s, t in zip(rows.stop, rows.target, strict=True)} <= kept
    texts = module.texts(ROWS, np.zeros(5, np.int64))
    answers = ["Yes." if liked else "No." for liked in rows.label]
    for text, target in zip(texts, ROWS.target, strict=True):  # type: ignore[arg-type]
        assert text.count("Decide whether") == 1  # the task is told once
        asked = [f'like the film "{TITLES[t - 1]}"?' for t in (*rows.target, target)]
        parts = [text[text.index("Liked:") :]]
        for question in asked:  # one after another
            before, _, rest = parts.pop().partition(question)
            parts += [before, rest]
        assert answers[0] in parts[1]
        assert answers[1] in parts[2]
        assert "Yes." not in parts[3] + parts[0]
        assert "No." not in parts[3] + parts[0]
    got = module.encode(batch_of(module))
    if not chat:
        expected = [margin_by_hand(module, folder, text) for text in texts]
        assert got.tolist() == pytest.approx(expected, abs=1e-4)


def test_without_examples_the_layout_is_the_plain_one(tmp_path: Path) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path)
    for chat in (False, True):
        plain = lay_out_shown(tokenizer, chat, "Do.", [], "x")
        shown = lay_out_shown(tokenizer, chat, "Do.", [("a", "Yes."), ("{b}", "No.")], "x")
        assert shown.count("Do.") == plain.count("Do.") == 1
        places = [shown.index(part) for part in ("Do.", "a", "Yes.", "{b}", "No.", "x")]
        assert places[2:] == sorted(places[2:])
    assert shown.endswith("<|user|>x</s><|assistant|>")
    assert "<|user|>Do.\n\na</s><|assistant|>Yes.</s><|user|>{b}</s><|assistant|>No.</s>" in shown


def test_no_event_that_is_tested_is_shown(
    tiny_movielens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    data = MovieLensDataModule(
        root=str(tiny_movielens), cache=str(tmp_path), examples=SlidingWindows(5, 3, 300)
    )
    held_out = {int(at) for code in (VALID, TEST) for at in data.rows(code).position}
    spec = BackboneSpec(str(folder), dtype="float32", chat_template=False, max_length=LONGEST)
    monkeypatch.setattr(FewShotModule, "trainer", SimpleNamespace(datamodule=data))
    for seed in range(30):
        module = FewShotModule(
            demonstrations=8, seed=seed, catalog=data.catalog, llm=spec, adapter=AdapterSpec("none")
        )
        rows = module.drawn_rows()
        shown = {
            at
            for s, e in zip(rows.start, rows.stop, strict=True)
            for at in range(int(s), int(e) + 1)
        }
        assert shown
        assert not shown & held_out
        assert {data.histories.split[at] for at in shown} == {TRAIN}
        assert np.array_equal(rows.label, data.histories.ratings[rows.stop] > 3)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_impossible_number_of_examples_is_refused(count: int, made: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"demonstrations is {count}, expected an even number"):
        made(FewShotModule, demonstrations=count)


# ---------------------------------------------------------------- reasons


@torch.no_grad()
def test_the_margin_is_read_behind_the_reasons(made: Callable[..., Any], folder: Path) -> None:
    module = made(ChainOfThoughtModule, rationale_tokens=5)
    got = module.encode(batch_of(module))
    written = list(module.generations.known.values())
    assert len(written) == len(module.generations.fresh) == 5
    assert all(len(tokens) <= 5 for tokens in written)
    yes, no = (module.tokenizer("\n" + w)["input_ids"][-1] for w in ("Yes", "No"))
    for value, prompt, reasons in zip(
        got.tolist(), module.texts(ROWS, np.zeros(5, np.int64)), written, strict=True
    ):
        asked = module.tokenizer(prompt)["input_ids"] + reasons
        asked += module.tokenizer(THEREFORE)["input_ids"]
        logits = module.model(torch.tensor([asked])).logits[0, -1]
        assert value == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-4)
    again = made(ChainOfThoughtModule, rationale_tokens=5)
    again.generations.known = dict(module.generations.known)
    again.model.generate = None  # nothing is written again
    assert torch.equal(again.encode(batch_of(again)), got)
    longer = made(ChainOfThoughtModule, rationale_tokens=6)
    longer.generations.known = dict(module.generations.known)
    longer.encode(batch_of(longer))
    assert len(longer.generations.fresh) == 5  # other settings, other texts


@torch.no_grad()
def test_reasons_leave_room_for_themselves(made: Callable[..., Any]) -> None:
    module = made(ChainOfThoughtModule, rationale_tokens=700)
    assert module.table.limit == LONGEST - module.answer_room()
    assert module.answer_room() > 700
    with pytest.raises(ValueError, match="rationale_tokens must be at least 1"):
        made(ChainOfThoughtModule, rationale_tokens=0)


@torch.no_grad()
def test_written_answers_are_taken_at_their_word(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(WrittenAnswerModule, rationale_tokens=3)
    told = iter(["Yes.", "no", "Perhaps", "Yes, I think", "Not Yes"])

    def write(prompts: Any, most: int) -> list[list[int]]:
        if most == 3:
            return [[40]] * len(prompts)
        return [module.tokenizer(next(told))["input_ids"] for _ in prompts]

    monkeypatch.setattr(module, "write", write)
    batch = batch_of(module)
    scores = module.score(module.encode(batch), batch.target[:, None])
    assert scores[:, 0].tolist() == [1.0, -1.0, 0.0, 1.0, 0.0]
    rates = module.label_metric()
    rates.update(*module.label_values(batch, scores))
    assert {k: v.item() for k, v in rates.compute().items()} == {
        "yes_rate": pytest.approx(0.4),
        "refusal_rate": pytest.approx(0.4),
    }


@given(st.text(max_size=20))
def test_any_text_is_yes_no_or_a_refusal(text: str) -> None:
    assert said_yes(text, ("Yes.", "No.")) in (1.0, 0.0, -1.0)
    assert said_yes(f"Yes. {text}", ("Yes.", "No.")) == 1.0


@pytest.mark.parametrize("kind", [FewShotModule, ChainOfThoughtModule, ListwiseModule])
def test_what_is_not_trained_says_so(kind: type, made: Callable[..., Any]) -> None:
    module = made(kind)
    assert "`run: test` stage" in module.untrainable(module.trainer)


# ---------------------------------------------------------------- lists


LISTED = ["Heat (1995)", "Rock, The (1996)", "101 Dalmatians (1996)", "Léon (1994)"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3\n1\n2", [2, 0, 1]), (" 4.\n", [3]), ("2)\n\n**1**", [1, 0]),  # numbers
        ('"Rock, The (1996)"\n heat (1995)', [1, 0]), ("101 Dalmatians (1996)", [2]),  # titles
        ('2. "Rock, The (1996)"\n4: *LÉON (1994)*', [1, 3]),  # with their own numbers
        ('1. "Léon (1994)"\n2. Heat (1995)', [3, 0]),  # the lines' own numbers
        ("Here they are:\n1. Rock, The (1996)", [1]), ("1\n1. Heat (1995)\n2", [0, 1]),
        ("1\n2\n3\n4", [0, 1, 2]),  # three were asked for
        ('1. "Heat"\n2. Rock, The\n3. "Léon (1994', []), ("Heat (1995) is best", []),
        ("3. Heat (1995)", []), ("2. Heat (1995)\n1. Heat (1995)", [0]),  # neither's number
        ("", []), ("5", []), ("0", []), ("3, 1", []), ("1 2", []), ("Film 1", []), ("1.5", []),
        ("-1", []), ("٣", []), ("9999999999", []), ("1 Heat (1995)", []),
    ],
)  # fmt: skip
def test_lines_name_what_they_name_exactly(text: str, expected: list[int]) -> None:
    assert named_items(text, LISTED, most=3) == expected


def test_what_might_be_several_is_none() -> None:
    twins = ["Hamlet (1996)", "2", "hamlet (1996)", "***"]
    for text in ("Hamlet (1996)", "1. foo\n2. Hamlet (1996)", "***", "\n", "9. *"):
        assert named_items(text, twins, 3) == []
    assert named_items("3. Hamlet (1996)\n2", twins, 3) == [2, 1]
    assert named_items("2\n1", ["A", "B", "2"], 3) == [0]  # the second, or the one called 2?


ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*LISTED, *"0123456789", "12", *".),:- *\"\n"]), max_size=12
    ).map("".join),
)  # fmt: skip


@given(ANY_TEXT, st.integers(0, 4))
def test_what_is_named_was_on_the_list(text: str, most: int) -> None:
    found = named_items(text, LISTED, most)
    assert len(found) <= most
    assert len(set(found)) == len(found)
    for item in found:  # none is made up: its number or its title stands there
        assert str(item + 1) in plain(text) or plain(LISTED[item]) in plain(text)


NAMES = st.lists(
    st.from_regex(r"[A-Za-z][a-z]{0,3}( [A-Z]{1,3})?(, The)? \(19[0-9]{2}\)", fullmatch=True),
    min_size=1, max_size=12, unique_by=str.casefold,
)  # fmt: skip


@given(NAMES, st.data())
def test_any_order_in_any_of_the_ways_is_read_back(names: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(names) - 1), unique=True))
    lines, numbered = [], 0
    for item in chosen:
        way = data.draw(st.sampled_from(["number", "title", "own", "counted"]))
        mark = data.draw(st.sampled_from(["", '"', "**", "“"]))
        numbered += way != "title"
        before = {"title": "", "counted": f"{numbered}. "}.get(way, f"{item + 1}. ")
        title = "" if way == "number" else f"{mark}{names[item]}{mark}"
        lines.append(before + title)
    assert named_items("\n".join(lines), names, len(names)) == chosen


@given(NAMES, st.data())
def test_a_title_that_is_not_exact_is_not_counted(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    cut = data.draw(st.integers(1, len(name) - 1))
    for line in (name[:cut], name + "x", f"x {name}", name.replace(" (", " ("[::-1])):
        if line.strip().casefold() not in {known.casefold() for known in names}:
            assert named_items(line, names, 3) == named_items(f"1. {line}", names, 3) == []


@given(st.integers(1, 6), st.data())
def test_implied_scores_are_means_over_the_orders_of_the_ties(
    count: int, data: st.DataObject
) -> None:
    named = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))
    got = implied_scores(named, count)
    if count == 1 or not named:
        assert got == [0.5] * count
        return
    rest = [i for i in range(count) if i not in named]
    orders = [[*named, *order] for order in itertools.permutations(rest)]
    for item in range(count):
        below = [count - 1 - order.index(item) for order in orders]
        assert got[item] == pytest.approx(sum(below) / len(below) / (count - 1))


def test_lists_hold_each_row_once_behind_a_history_without_their_labels() -> None:
    lists = candidate_lists(HELD_OUT, HISTORIES, list_size=2, seed=0)
    for row, (user, stop, target) in enumerate(
        zip(TESTED.user, TESTED.stop, TESTED.target, strict=True)
    ):
        asked = lists[row]
        assert target in asked.items
        assert asked.stop <= stop
        assert asked.stop - asked.start == 2
        shown = {int(HISTORIES.items[at]) for at in range(asked.start, asked.stop)}
        assert not shown & set(asked.items)
        assert HISTORIES.users[asked.start] == user
    by_user = {1: {lists[i] for i in (0, 2, 3)}, 2: {lists[i] for i in (1, 4)}}
    assert sorted(len(made.items) for made in by_user[1]) == [1, 2]
    assert [len(made.items) for made in by_user[2]] == [2]
    orders = {candidate_lists(HELD_OUT, HISTORIES, 3, seed)[0].items for seed in range(20)}
    assert orders == set(itertools.permutations((5, 6, 7)))


@torch.no_grad()
def test_places_in_a_list_are_scores(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(ListwiseModule, prompt=ListPrompt(top=2), list_size=3)
    texts = module.texts(ROWS, np.zeros(5, np.int64))
    first = module.lists[0]
    assert texts[0] == texts[2] == texts[3] != texts[1] == texts[4]
    assert f'Candidates:\n1. "{TITLES[first.items[0] - 1]}"\n2. ' in texts[0]
    assert 'Liked: "Film 3"\nDisliked: "Film 4"\n' in texts[0]
    asked: list[int] = []

    def write(prompts: Any, most: int) -> list[list[int]]:
        asked.append(len({tuple(p) for p in prompts}))
        mark = f'1. "{TITLES[first.items[0] - 1]}"'
        said = ["2" if mark in module.said(p) else "all" for p in prompts]
        return [module.tokenizer(text)["input_ids"] for text in said]

    monkeypatch.setattr(module, "write", write)
    batch = batch_of(module)
    got = module.encode(batch).tolist()
    assert asked == [2]  # two lists
    for row in (0, 2, 3):
        best = first.items[1] == int(TESTED.target[row])
        assert got[row] == (1.0 if best else 0.25)
    assert got[1] == got[4] == 0.5  # refused
    rates = module.label_metric()
    rates.update(*module.label_values(batch, torch.tensor(got)[:, None]))
    assert {k: v.item() for k, v in rates.compute().items()} == {"refusal_rate": pytest.approx(0.4)}


@torch.no_grad()
def test_the_line_that_an_answer_was_cut_in_is_not_counted(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(ListwiseModule, prompt=ListPrompt(top=2), list_size=3)
    one, two, line = (module.tokenizer(text)["input_ids"] for text in ("1", "2", "\n"))
    batch = batch_of(module)
    for length, expected in ((module.answer_room(), [1]), (module.answer_room() - 1, [1, 0])):
        written = two + line * (length - 2) + one
        monkeypatch.setattr(module, "write", lambda prompts, most, w=written: [w] * len(prompts))
        assert module._named(batch) == [expected] * 5


def test_lists_that_leave_no_choice_are_refused(made: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="list_size is 3, expected more than the 3"):
        made(ListwiseModule, list_size=3)
    with pytest.raises(ValueError, match="top must be at least 1"):
        ListPrompt(top=0)
    with pytest.raises(ValueError, match="no probes"):
        made(ListwiseModule, probe="masked")
