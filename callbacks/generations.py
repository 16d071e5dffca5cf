"""Generated texts, append-only, keyed by content hash: a stage that was cut off writes only what is missing.

One JSON object a line: ``key``, ``tokens`` and their ``text``. Every rank appends to a file of its own; all
read all files when a test starts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

logger = logging.getLogger(__name__)


class GenerationsLog(lightning.Callback):
    """Keeps what a module's ``generations`` hold, in ``generations.NAME.RANK.jsonl``.

    Args:
        folder: of the stage.
        name: of the row that is tested, or of the stage that predicts.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = Path(folder), name
        self.file = self.folder  # of this rank, known when a test starts

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """As in a test."""
        self.on_test_start(trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, *unused: Any
    ) -> None:
        """As in a test."""
        self.on_test_batch_end(trainer, pl_module)

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Hand over what the other devices have written."""
        trainer.strategy.barrier()
        self._hand_over(pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Hand over what an earlier attempt has written; half a line that a kill has left is cut off."""
        self.file = self.folder / f"generations.{self.name}.{trainer.global_rank:04d}.jsonl"
        cut_half_line(self.file)
        trainer.strategy.barrier()
        self._hand_over(pl_module)
        trainer.strategy.barrier()  # nobody appends while another reads

    def _hand_over(self, pl_module: Any) -> None:
        for file in sorted(self.folder.glob(f"generations.{self.name}.*.jsonl")):
            for line in read_lines(file):
                pl_module.generations.known[line["key"]] = line["tokens"]

    def on_test_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *unused: Any) -> None:
        """Append what the batch has added."""
        fresh = pl_module.generations.take_fresh()
        if not fresh:
            return
        texts = pl_module.tokenizer.batch_decode([g.tokens for g in fresh])
        lines = [
            {"key": g.key, "tokens": g.tokens, "text": text}
            for g, text in zip(fresh, texts, strict=True)
        ]
        with self.file.open("ab") as out:
            out.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def cut_half_line(file: Path) -> None:
    """Shorten a file to its whole lines; one that does not exist is made."""
    with file.open("ab+") as out:
        out.seek(0)
        out.truncate(len(_whole(out.read())))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what cannot be read is left out with a warning, and is written again."""
    found: list[dict[str, Any]] = []
    lines = _whole(file.read_bytes()).split(b"\n")[:-1]
    for line in lines:
        try:
            entry = json.loads(line)
            if isinstance(entry["key"], str) and all(type(i) is int for i in entry["tokens"]):
                found.append(entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    if len(found) < len(lines):
        logger.warning("%s: %d unreadable lines left out", file, len(lines) - len(found))
    return found


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
