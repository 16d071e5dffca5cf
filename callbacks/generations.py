"""Generated texts, append-only, keyed by content hash: a stage that was cut off writes only what is missing.

One JSON object a line: ``key``, ``tokens``, their ``text`` and a check sum. Every rank appends to a file of
its own; all read all files when a test starts. A stage's files hold all of its texts, also those that it has
found in the store that runs share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

from callbacks.generation_store import (
    GenerationStore,
    append,
    cut_half_line,
    line_of,
    read_lines,
)


class GenerationsLog(lightning.Callback):
    """Keeps what a module's ``generations`` hold, in ``generations.NAME.RANK.jsonl``.

    Args:
        folder: of the stage.
        name: of the row that is tested, or of the stage that predicts.
        shared: folder of texts that runs share, a file for each ``writer`` of a module. For modules whose
            texts depend on tokens alone besides: a row's number means another row in other data.
    """

    def __init__(self, folder: Path, name: str, shared: Path | None = None) -> None:
        self.folder, self.name, self.shared = Path(folder), name, shared
        self.file = self.folder  # of this rank, known when a test starts
        self.store: GenerationStore | None = None

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
        if self.shared is not None:
            self.store = GenerationStore(self.shared / f"{pl_module.writer[:32]}.jsonl")
            pl_module.generations.elsewhere = self.store
        trainer.strategy.barrier()
        self._hand_over(pl_module)
        trainer.strategy.barrier()  # nobody appends while another reads

    def _hand_over(self, pl_module: Any) -> None:
        for file in sorted(self.folder.glob(f"generations.{self.name}.*.jsonl")):
            for line in read_lines(file):
                pl_module.generations.known.setdefault(line["key"], line["tokens"])

    def on_test_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *unused: Any) -> None:
        """Append what the batch has added."""
        fresh = pl_module.generations.take_fresh()
        if not fresh:
            return
        texts = pl_module.tokenizer.batch_decode([g.tokens for g in fresh])
        lines = [line_of(g.key, g.tokens, text) for g, text in zip(fresh, texts, strict=True)]
        append(self.file, lines)
        written = [line for g, line in zip(fresh, lines, strict=True) if not g.found]
        if self.store is not None and written:
            self.store.add(written)
