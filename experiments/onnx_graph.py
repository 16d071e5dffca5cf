"""A collaborative model as an ONNX graph: ids in, scores of all items out, and the proof that they agree.

Legend: B rows, T history length, I items.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.types import Batch
from experiments.errors import UserError
from lightning_modules.next_item import NextItemModule
from lightning_modules.static_shapes import static_shapes

TOLERANCE = 1e-4  # of ONNX Runtime's scores and torch's, relative to the largest
OPSET = 20
_PROBED = 64  # rows that the proof compares


class Graph(nn.Module):
    """``user`` (B,) and ``history`` (B, T), as far as the method reads them, to scores (B, I + 1).

    Column ``i`` is the internal item ``i``; that of padding is -inf. Histories are int64, oldest first,
    padded on the right with 0; what was seen is scored like all else.
    """

    table: Tensor
    users: Tensor

    def __init__(self, module: NextItemModule) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs_of(module)
        self.register_buffer("table", module.item_vectors().detach().clone().contiguous())
        if not module.reads_histories:
            everyone = torch.arange(module.num_users + 1)  # type: ignore[arg-type, operator]
            none = torch.zeros(len(everyone), 1, dtype=torch.int64)
            batch = Batch(
                row=everyone, user=everyone, history=none, length=torch.zeros_like(everyone)
            )
            self.register_buffer("users", module.user_vectors(batch).detach().clone())

    def forward(self, *given: Tensor) -> Tensor:
        """Scores (B, I + 1)."""
        told = dict(zip(self.inputs, given, strict=True))
        if "history" not in told:
            state = self.users[told["user"]]
        else:
            history = told["history"]
            user = told.get("user", torch.zeros_like(history[:, 0]))
            length = (history > 0).sum(1)
            state = self.module.encode(Batch(row=user, user=user, history=history, length=length))
        items = torch.arange(1, len(self.table))
        self.module._table = self.table
        scores = self.module.score(state, items)  # (B, I)
        return nn.functional.pad(scores, (1, 0), value=-torch.inf)


def inputs_of(module: NextItemModule) -> tuple[str, ...]:
    """The names of what a method reads of a row."""
    if not module.reads_histories:
        return ("user",)
    return ("user", "history") if module.reads_users else ("history",)


def longest(module: NextItemModule) -> int:
    """T: the events of a history that the method reads."""
    collate: Any = module.collator(training=False)
    return int(collate.max_length)


def write_onnx(module: NextItemModule, path: Path) -> None:
    """Write the graph, with any number of rows.

    Args:
        module: finished and set up, on the CPU; it is not changed.
        path: the file.

    Raises:
        UserError: the method reads what ids cannot say, or computes what the format does not have.
    """
    collate: Any = module.collator(training=False)
    if getattr(collate, "times", False):
        raise UserError(
            f"{type(module).__name__} reads the times of events, which histories of ids do not have: only "
            "its weights are written (time_bias=false makes it a model of ids)"
        )
    examples = _examples(module, torch.full((2,), 2), torch.ones(2, longest(module)).long())
    rows = torch.export.Dim("rows")
    try:
        with _evaluating(module), static_shapes(), torch.no_grad(), _silent():
            graph = Graph(module).eval()
            program = torch.onnx.export(
                graph, examples, input_names=list(graph.inputs), output_names=["scores"],
                dynamic_shapes={"given": tuple({0: rows} for _ in examples)}, dynamo=True,
                opset_version=OPSET,
            )  # fmt: skip
            assert program is not None
            program.save(path, external_data=False)
    except ImportError as error:
        raise UserError(
            f'ONNX files need {error.name}, which is not installed: pip install -e ".[onnx]"'
        ) from error
    except Exception as error:
        path.unlink(missing_ok=True)
        cause = error
        while isinstance(cause.__cause__, Exception):  # the exporter wraps what stopped it
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0][:200]
        raise UserError(
            f"{type(module).__name__} cannot be written as ONNX ({type(cause).__name__}: {reason}): only its "
            "weights are written"
        ) from error


def largest_difference(module: NextItemModule, path: Path, histories: Any) -> float:
    """Between ONNX Runtime's scores and torch's over rows of real users, relative to the largest score.

    Raises:
        UserError: ONNX Runtime is not installed, or they differ by more than ``TOLERANCE``.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            'the ONNX file cannot be compared with torch without onnxruntime: pip install -e ".[onnx]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    users = torch.arange(1, min(_PROBED, histories.num_users) + 1)
    width = longest(module)
    grid = np.zeros((len(users), width), np.int64)
    for row, user in enumerate(users.tolist()):
        # Of all lengths: the first row's is empty, the last is whole.
        own = histories.items[histories.offsets[user] : histories.offsets[user + 1]][-width:]
        own = own[: len(own) * row // max(1, len(users) - 1)]
        grid[row, : len(own)] = own
    given = _examples(module, users, torch.from_numpy(grid))
    with _evaluating(module), torch.no_grad():
        length = torch.from_numpy((grid > 0).sum(1))
        batch = Batch(row=users, user=users, history=torch.from_numpy(grid), length=length)
        items = torch.arange(1, histories.num_items + 1)
        expected = module.score(module.encode(batch), items).numpy()  # (B, I)
    feed = dict(zip(inputs_of(module), (t.numpy() for t in given), strict=True))
    (found,) = session.run(["scores"], feed)
    worst = float(np.abs(found[:, 1:] - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path} is wrong: its scores differ from torch's by {worst:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}"
        )
    return worst


def _examples(module: NextItemModule, user: Tensor, history: Tensor) -> tuple[Tensor, ...]:
    known = {"user": user, "history": history}
    return tuple(known[name] for name in inputs_of(module))


@contextmanager
def _evaluating(module: NextItemModule) -> Iterator[None]:
    """As in a test, and without the table that an evaluation keeps."""
    was = module.training
    module._parameters.pop("_table", None)  # an evaluation may have kept a parameter there
    module._table = None
    module.eval()
    try:
        yield
    finally:
        module.train(was)
        module._table = None


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter tells each of its steps, and of operators that are not there."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
