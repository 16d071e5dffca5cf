"""What A-LLMRec's prompts say, and how the words of others are kept from saying more than they should."""

from __future__ import annotations

from typing import Any

from datamodules.types import ItemWords
from lightning_modules.llm.wording import as_data

# Private code points that no text has: where a prompt's text is cut.
USER_MARK, HISTORY_MARK, CANDIDATES_MARK = "\ue000", "\ue001", "\ue002"
LONGEST_REQUEST = 300  # characters


def question(
    words: ItemWords, user_token: bool, request: str | None = None, lettered: bool = False
) -> str:
    """The message, with marks where the user's token and the two lists belong; each line ends in a break."""
    wish = f'They say what they are looking for: "{request}"\n' if request else ""
    who = f"{USER_MARK} stands for one person. They have" if user_token else "Somebody has"
    answer = "letter" if lettered else "title in quotation marks"
    return (
        f"{who} {words.past} these {words.plural}, the oldest first:\n{HISTORY_MARK}{wish}Which "
        f"{words.singular} will they {words.present} next? Choose one of these {words.plural}:\n"
        f"{CANDIDATES_MARK}Answer with its {answer} and nothing else."
    )


def required_request(request: str, tokenizer: Any) -> str:
    """A user's words ``as_data``; raises ValueError where nothing is left, or too much."""
    (kept,) = as_data([request], tokenizer)
    if not 1 <= len(kept) <= LONGEST_REQUEST:
        raise ValueError(
            f"a request has {len(kept)} characters, expected 1 to {LONGEST_REQUEST}: say it in a sentence"
        )
    return kept
