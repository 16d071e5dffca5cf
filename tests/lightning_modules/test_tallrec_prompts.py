"""The words of TALLRec's question, and how layouts put them together."""

from __future__ import annotations

import pytest

from lightning_modules.llm.layouts import alpaca, chat, lay_out
from lightning_modules.tallrec.prompts import Question, YesNoPrompt, probed, shown_items


def test_a_question_names_what_was_liked_what_was_not_and_the_target() -> None:
    prompt = YesNoPrompt("book", "books")
    text = prompt.input(Question(("Emma by Jane Austen", "It"), ("Dune",), "Ulysses"))
    liked, disliked, asked = text.splitlines()
    assert liked == 'Liked: "Emma by Jane Austen", "It"'
    assert disliked == 'Disliked: "Dune"'
    assert '"Ulysses"' in asked
    assert "book" in asked
    assert "books" in prompt.instruction()
    assert '"Yes."' in prompt.instruction()
    assert '"No."' in prompt.instruction()


def test_an_empty_list_is_told_in_words() -> None:
    liked, disliked, _ = YesNoPrompt().input(Question((), (), "X")).splitlines()
    assert liked.removeprefix("Liked: ") == disliked.removeprefix("Disliked: ") != ""


def test_blank_names_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a name"):
        YesNoPrompt(" ", "films")


def test_makers_are_shown_where_they_are_known() -> None:
    titles, makers = ["", "Emma", "Beowulf"], ["", "Jane Austen", None]
    assert shown_items(titles, makers) == ["", "Emma by Jane Austen", "Beowulf"]
    assert shown_items(titles) == titles


def test_years_are_left_out_at_the_end_of_a_title_alone() -> None:
    titles = ["", "Alien (1979)", "2001: A Space Odyssey (1968) ", "(1984)", "Blade (1998) II"]
    shown = ["", "Alien", "2001: A Space Odyssey", "(1984)", "Blade (1998) II"]
    assert shown_items(titles, years=False) == shown
    assert shown_items(["Emma (1815)"], ["Jane Austen"], years=False) == ["Emma by Jane Austen"]
    remade = ["Sabrina (1954)", "Sabrina (1995)", "Heat (1995)", "Heat (1995)"]
    assert shown_items(remade, years=False) == [*remade[:2], "Heat", "Heat"]


def test_counts_stand_before_the_question() -> None:
    prompt = YesNoPrompt("book", "books", counts=True)
    asked = prompt.input(Question(("a", "b"), ("c",), "d"))
    assert asked.splitlines()[-1] == 'They liked 2 of 3 books. Will they like the book "d"?'
    assert "They liked 0 of 0 books." in prompt.input(Question((), (), "d"))


def test_alpacas_three_parts_end_where_the_response_begins() -> None:
    text = alpaca("Do it.", "With this.")
    parts = [text.index(p) for p in ("### Instruction:\nDo it.", "### Input:\nWith this.")]
    assert parts == sorted(parts)
    assert text.endswith("### Response:\n")
    assert "### Input:" not in alpaca("Do it.")


WHOLE = Question(("A", "B", "C", "D"), ("E", "F"), "T")


def test_probes_take_away_what_they_say() -> None:
    prompt = YesNoPrompt()
    assert probed(WHOLE, "none", prompt, (1,)) == WHOLE
    assert probed(WHOLE, "no_history", prompt, (1,)) == Question((), (), "T")
    assert probed(WHOLE, "swapped", prompt, (1,)) == Question(WHOLE.disliked, WHOLE.liked, "T")
    shuffled = [probed(WHOLE, "shuffled", prompt, (seed,)) for seed in range(8)]
    assert {tuple(sorted(q.liked)) for q in shuffled} == {WHOLE.liked}
    assert len({q.liked for q in shuffled}) > 1
    assert probed(WHOLE, "shuffled", prompt, (3,)) == shuffled[3]
    again = Question(("A", "B"), ("C",), "A")  # asked about an item of the history
    masked = probed(again, "masked", prompt, (1,))
    assert masked == Question(("film 1", "film 2"), ("film 3",), "film 1")


class Templated:
    """Records what a chat template is given."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        expected = {
            "tokenize": False, "add_generation_prompt": True, "enable_thinking": False,
            "date_string": "26 Jul 2024",
        }  # fmt: skip
        (message,) = messages
        assert options == expected or message["content"] == "\ue0f1"  # how it takes contents
        return f"<{message['role']}>{message['content']}<assistant>"


def test_a_chat_is_one_message_of_the_user() -> None:
    assert chat(Templated(), "Do it.", "With this.") == "<user>Do it.\n\nWith this.<assistant>"
    assert chat(Templated(), "Do it.") == "<user>Do it.<assistant>"
    assert lay_out(Templated(), True, "Do it.") == chat(Templated(), "Do it.")
    assert lay_out(Templated(), False, "Do it.", "x") == alpaca("Do it.", "x")
