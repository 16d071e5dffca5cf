"""How histories are cut, and which texts have to be there before another can be written.

Legend: H histories, S steps. A step is one call of the language model; its wave is how many calls come before
it, one after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

Mode = Literal["recurrent", "direct", "sliding"]
Join = Literal["carry", "merge"]
Span = tuple[int, int]  # events start, ..., stop - 1


def blocks(start: int, stop: int, size: int) -> list[Span]:
    """Consecutive blocks, oldest first, each event in one of them; the newest block is the short one.

    So a user's longer history begins with the blocks of a shorter one: what is written of them serves both.
    """
    return windows(start, stop, size, size)


def windows(start: int, stop: int, width: int, step: int) -> list[Span]:
    """Windows that begin ``step`` events apart, oldest first, up to the first that reaches the newest event.

    No history has none; one of at most ``width`` events has one window. Only the newest may be short, and it
    always shows an event that those before it do not.

    Raises:
        ValueError: windows without events, or a step that would pass over some.
    """
    if not 1 <= step <= width:
        raise ValueError(
            f"a window of {width} events and a step of {step} pass over events or never end: expected "
            "1 <= step <= window"
        )
    found = []
    at = start
    while at < stop:
        found.append((at, min(at + width, stop)))
        if at + width >= stop:
            break
        at += step
    return found


class Step(NamedTuple):
    """One text: the events it is about, and the earlier steps whose texts it reads."""

    start: int
    stop: int
    before: tuple[int, ...] = ()
    merges: bool = False  # is about the texts of ``before`` alone


@dataclass(frozen=True)
class Cut:
    """How a history becomes steps.

    Args:
        mode: ``recurrent``: consecutive blocks, each read with the text before it, h_k = LLM(block_k,
            h_(k-1)) (MLLM-MSR, arXiv 2408.09698); ``direct``: all events at once; ``sliding``: windows that
            may overlap (MLLM-SRec, s41598-025-14251-1).
        block_size: events of a block.
        window: events of a window.
        step: events between two windows; None: a whole window.
        join: ``carry``: each window is read with the text before it; ``merge``: each alone, and a last call
            makes one text of theirs.

    Raises:
        ValueError: an unknown mode or join, or see ``windows``.
    """

    mode: Mode = "recurrent"
    block_size: int = 3
    window: int = 5
    step: int | None = None
    join: Join = "carry"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode) or self.join not in get_args(Join):
            raise ValueError(
                f"mode is {self.mode!r} and join {self.join!r}: expected one of {', '.join(get_args(Mode))}, "
                f"and one of {', '.join(get_args(Join))}"
            )
        self.spans(0, 1)

    @property
    def carries(self) -> bool:
        """Whether a text is read with the one before it."""
        return self.mode == "recurrent" or (self.mode == "sliding" and self.join == "carry")

    def spans(self, start: int, stop: int) -> list[Span]:
        """The events of each call."""
        if self.mode == "direct":
            return [(start, stop)] if start < stop else []
        if self.mode == "recurrent":
            return blocks(start, stop, self.block_size)
        return windows(start, stop, self.window, self.window if self.step is None else self.step)


@dataclass
class Plan:
    """The steps of all histories, each once; a step's number is larger than those of what it reads."""

    steps: list[Step] = field(default_factory=list)  # (S,)
    wave: list[int] = field(default_factory=list)  # (S,)
    owner: list[int] = field(default_factory=list)  # (S,) the user
    chains: list[list[int]] = field(
        default_factory=list
    )  # (H) steps, the last one's text is the answer

    @classmethod
    def of(cls, cut: Cut, users: Sequence[int], spans: Iterable[Span]) -> Plan:
        """The plan for histories (H,)."""
        plan, number = cls(), dict[Step, int]()
        for user, (start, stop) in zip(users, spans, strict=True):
            chain: list[int] = []
            for first, last in cut.spans(start, stop):
                before = tuple(chain[-1:]) if cut.carries else ()
                chain.append(plan._add(Step(first, last, before), user, number))
            if len(chain) > 1 and not cut.carries:
                chain.append(plan._add(Step(0, 0, tuple(chain), merges=True), user, number))
            plan.chains.append(chain)
        return plan

    def _add(self, step: Step, user: int, number: dict[Step, int]) -> int:
        if step not in number:
            number[step] = len(self.steps)
            self.steps.append(step)
            self.wave.append(1 + max((self.wave[b] for b in step.before), default=-1))
            self.owner.append(user)
        return number[step]

    @property
    def waves(self) -> int:
        """Calls one after the other, at least, whatever the number of users."""
        return max(self.wave, default=-1) + 1

    def in_waves(self) -> list[list[int]]:
        """The steps' numbers by wave: those of one wave do not read each other's texts."""
        found: list[list[int]] = [[] for _ in range(self.waves)]
        for number, wave in enumerate(self.wave):
            found[wave].append(number)
        return found

    def batches(
        self, lengths: Sequence[int], size: int, rank: int, world_size: int
    ) -> list[list[int]]:
        """One device's steps: whole users, wave by wave, those of like length together, the longest first.

        Args:
            lengths: (S,) of what each step shows, in whatever is padded.
            size: of a batch, at most.
            rank, world_size: users are dealt out to devices, those with the most steps first.
        """
        load: dict[int, int] = defaultdict(int)
        for user in self.owner:
            load[user] += 1
        dealt = sorted(load, key=lambda user: (-load[user], user))[rank::world_size]
        mine = set(dealt)
        found = []
        for wave in self.in_waves():
            order = [number for number in wave if self.owner[number] in mine]
            order.sort(key=lambda number: -lengths[number])
            found += [order[at : at + size] for at in range(0, len(order), size)]
        return found
