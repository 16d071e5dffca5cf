"""What a finished experiment is asked for, and what it answers, in plain values. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl

from datamodules.types import EvalRows
from experiments.errors import UserError
from experiments.titles import ItemNames

ITEM_TWICE = "items holds an item twice"


@dataclass(frozen=True)
class Ask:
    """What one list is asked for with; ids are raw ones.

    Args:
        user: whose history and, in methods that have some, whose vectors are read.
        history: items, oldest first, in place of the user's own; without a user it is nobody's.
        exclude: items that are not wanted, besides those of the history.
        request: what is looked for, in words.
        before_target: behind the user's history as evaluation sees it, with nothing after it.
        items: rank these alone, those of the history, too.
        keep_seen: rank the items of the history, too.
    """

    user: str | None = None
    history: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    request: str = ""
    before_target: bool = False
    items: tuple[str, ...] | None = None
    keep_seen: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """What those share that can be answered together."""
        made_up, many = self.history is not None, None if self.items is None else len(self.items)
        return self.request, made_up, self.before_target, many, self.keep_seen


def asks_of(
    users: str | int | Sequence[str | int] | None,
    histories: Sequence[str] | Sequence[Sequence[str]] | None,
    names: ItemNames,
    exclude: str | Sequence[str],
    items: Sequence[str] | None,
    **others: Any,
) -> list[Ask]:
    """One for each user or history of a call of ``Recommender.recommend``.

    Raises:
        UserError: nobody is asked for, or an item is unknown.
    """
    own = [users] if isinstance(users, (str, int)) else None if users is None else list(users)
    given: list[Any] | None = [histories] if isinstance(histories, str) else histories  # type: ignore[assignment]
    if given and isinstance(given[0], (str, int)):
        given = [given]
    if own is None and given is None:
        raise UserError("nobody is asked for: give users=, or histories=")
    if own is not None and given is not None and len(own) != len(given):
        raise UserError(f"{len(own)} users and {len(given)} histories: give one for each")

    def raw(named: str | int | Sequence[str | int]) -> tuple[str, ...]:
        some = [named] if isinstance(named, (str, int)) else named
        return tuple(names.raw(str(each)) for each in some)

    events = None if given is None else [raw(each) for each in given]
    shared = {"exclude": raw(exclude), "items": None if items is None else raw(items), **others}
    return [
        Ask(None if own is None else str(own[i]), None if events is None else events[i], **shared)
        for i in range(len(own if own is not None else events or []))
    ]


@dataclass(frozen=True)
class Recommended:
    """One item of a list; ``retrieved`` is its place in the list that a retriever handed over."""

    item: str
    title: str
    score: float
    retrieved: int | None = None


@dataclass(frozen=True)
class Recommendations:
    """What was asked for, and what is shown, best first.

    Args:
        ask, items: see above.
        reason: why the first one, in a language model's words, of which the metadata support each.
        dropped: statements of the reason that they do not support.
        preference: what the method was told of the user by an earlier stage.
    """

    ask: Ask
    items: tuple[Recommended, ...]
    reason: str | None = None
    dropped: int = 0
    preference: str | None = None


def plain_values(found: Recommendations, name: str, names: ItemNames) -> dict[str, Any]:
    """One list as JSON has it.

    Args:
        found: the list.
        name: of the experiment.
        names: of its items.
    """
    history = [
        {"item": raw, "title": names.titles[names.of_id(raw) - 1]}
        for raw in found.ask.history or ()
    ]
    items = [
        {"item": r.item, "title": r.title, "score": r.score}
        | ({} if r.retrieved is None else {"retrieved_as": r.retrieved})
        for r in found.items
    ]
    told: dict[str, Any] = {"experiment": name, "user": found.ask.user, "items": items}
    told |= {"history": history} if history else {}
    told |= {"preference": found.preference} if found.preference is not None else {}
    if found.reason is not None or found.dropped:
        told |= {"reason": found.reason, "statements_dropped": found.dropped}
    return told


def require_items(ask: Ask) -> None:
    """Raise UserError where the items to rank are none, or hold one twice."""
    if ask.items is not None and len(set(ask.items)) < max(1, len(ask.items)):
        raise UserError(ITEM_TWICE if ask.items else "items holds no item")


def require_possible(module: Any, ask: Ask) -> None:
    """Raise UserError for what a method can never be asked for."""
    require_items(ask)
    name = type(module).__name__
    if ask.request and not module.reads_requests:
        raise UserError(
            f"{name} reads no words: leave REQUEST out, or ask a language model's method"
        )
    if ask.history is not None and ask.user is None and not module.reads_histories:
        raise UserError(f"{name} knows users by their ids and reads no history: give a user")
    if ask.history is not None and module.reads_summaries:
        raise UserError(
            f"{name} reads what an earlier stage wrote of the users of the data: give a user, without a "
            "history"
        )


def require_told_apart(module: Any, ask: Ask, scores: Sequence[float]) -> None:
    """Raise UserError where a method has nothing to go by: an empty history, and all items alike."""
    if ask.history == () and len(scores) > 1 and len(set(scores)) == 1:
        raise UserError(
            f"{type(module).__name__} tells no items apart behind an empty history: give it an item, or ask "
            "popularity"
        )


class Found(NamedTuple):
    """One row's items in internal ids, best first, their scores, and why the first one."""

    items: list[int]
    scores: list[float]
    reason: str | None


def in_order(batches: Sequence[Any]) -> list[Found]:
    """Predicted batches (``lightning_modules.base.Best``) row by row, without padding."""
    found: dict[int, Found] = {}
    for best in batches:
        for i, row in enumerate(best.row.tolist()):
            real = best.items[i] > 0
            why = best.reasons[i] if best.reasons else None
            found[row] = Found(best.items[i][real].tolist(), best.scores[i][real].tolist(), why)
    return [found[row] for row in sorted(found)]


def best_of(rows: EvalRows, each: list[Found]) -> list[Found]:
    """Rows of one item each, put together again."""
    assert rows.candidates is not None
    found = []
    width = rows.candidates.shape[1]
    for i in range(len(rows.user)):
        own = each[i * width : (i + 1) * width]
        pairs = sorted(((f.scores[0], -f.items[0]) for f in own if f.items), reverse=True)
        found.append(Found([-item for _, item in pairs], [score for score, _ in pairs], None))
    return found


def frame(lists: Sequence[Recommendations]) -> pl.DataFrame:
    """Lists as one table: a line an item, with the row it is of and its place."""
    lines = [
        {"row": row, "user": told.ask.user, "place": place, "item": r.item, "title": r.title,
         "score": r.score, "retrieved": r.retrieved}
        for row, told in enumerate(lists)
        for place, r in enumerate(told.items, start=1)
    ]  # fmt: skip
    kinds = {"row": pl.Int64, "user": pl.String, "place": pl.Int64, "item": pl.String,
             "title": pl.String, "score": pl.Float64, "retrieved": pl.Int64}  # fmt: skip
    return pl.DataFrame(lines, schema=kinds)
