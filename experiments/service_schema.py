"""What a service is asked and answers, as JSON: strict types, no other keys, and a bound on every length."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from experiments.asked import ITEM_TWICE
from experiments.recommend import MOST

LONGEST_ID = 200  # signs of an id or a title
LONGEST_REQUEST = 1000  # signs
MOST_EVENTS = 1000  # of a history, and of what is excluded
MOST_ASKS = 100  # of one request


def _as_text(value: Any) -> str:
    """Ids of most data are numbers: they may be written as such."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return str(value)
    if isinstance(value, str) and 1 <= len(value.strip()) <= LONGEST_ID:
        return value.strip()
    raise ValueError(f"expected a text of 1 to {LONGEST_ID} signs, or a whole number")


_Id = BeforeValidator(_as_text, json_schema_input_type=str | int)
UserId = Annotated[str, _Id]
Item = Annotated[str, _Id]
Events = Annotated[list[Item], Field(max_length=MOST_EVENTS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Asked(_Strict):
    """One list. Items are raw ids, or titles where no id is the same."""

    user: UserId | None = Field(None, description="the user's id in the data")
    history: list[Item] | None = Field(
        None, min_length=1, max_length=MOST_EVENTS,
        description="items, oldest first, in place of the user's own; without a user nobody's",
    )  # fmt: skip
    k: int = Field(10, ge=1, le=MOST, description="items of the list")
    exclude: Events = Field([], description="items that are not wanted, besides the history's")
    items: list[Item] | None = Field(
        None, min_length=1, max_length=MOST,
        description="rank these alone, in the history or not: keep_seen changes nothing",
    )  # fmt: skip
    request: str = Field(
        "", max_length=LONGEST_REQUEST,
        description="what is looked for, in words, for methods that read them",
    )  # fmt: skip
    before_target: bool = Field(
        False, description="behind the user's history as evaluation sees it"
    )
    keep_seen: bool = Field(False, description="rank the items of the history, too")

    @model_validator(mode="after")
    def _somebody(self) -> Asked:
        if self.user is None and self.history is None:
            raise ValueError("nobody is asked for: give a user, or a history")
        if self.before_target and self.history is not None:
            raise ValueError("before_target is of a user's own history: leave history out")
        if self.before_target and self.keep_seen:
            raise ValueError("before_target masks what the evaluation masks: leave keep_seen out")
        if self.items is not None and len(set(self.items)) < len(self.items):
            raise ValueError(ITEM_TWICE)
        return self


class AskedMany(_Strict):
    """Several lists, each of its own kind and length."""

    asks: list[Asked] = Field(min_length=1, max_length=MOST_ASKS)


class Shown(_Strict):
    """One item of a list; ``retrieved_as`` is its place in the list that a retriever handed over."""

    item: str
    title: str
    score: float
    retrieved_as: int | None = None


class Event(_Strict):
    """One item of a history that was given."""

    item: str
    title: str


class Answer(_Strict):
    """One list, best first, and what a language model has to say of the first item."""

    experiment: str
    user: str | None
    items: list[Shown]
    history: list[Event] | None = None
    preference: str | None = None
    reason: str | None = None
    statements_dropped: int | None = None


class Answers(_Strict):
    """The lists in the order in which they were asked for."""

    lists: list[Answer]


class Health(_Strict):
    """``ready``: the model is loaded, and the service does not end."""

    alive: bool
    ready: bool


class About(_Strict):
    """What answers, and how it was measured."""

    experiment: str
    stage: str
    method: str
    fingerprint: str | None
    items: int
    new_items: int
    users: int
    reads_histories: bool
    reads_requests: bool
    metrics: dict[str, float]


class Refusal(_Strict):
    """Why there is no answer, in one sentence."""

    error: str
