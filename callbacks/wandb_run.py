"""Weights & Biases' logger, which never stops a run: without a network it records offline, and says so once.

What was recorded offline lies below the stage's folder; ``wandb sync`` sends it, under the same id. So does
what was begun on a server that stopped answering, which wandb calls an online run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

logger = logging.getLogger(__name__)
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # columns, rows


class WandbRun(WandbLogger):
    """One W&B run for each stage, or row of a stage.

    Args:
        log_scores: also send the scored candidates, as an artifact.
        options: of Lightning's ``WandbLogger`` and of ``wandb.init``.
    """

    offline = False  # whether this process has waited for the server in vain

    def __init__(self, log_scores: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.log_scores = log_scores
        self._silent = False  # it failed, and a user was told

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run; where the server cannot be reached an offline one."""
        if self._experiment is None:
            try:
                return self._begun()
            except (
                Exception
            ) as error:  # of the network, of an account: nothing that a run depends on
                import wandb

                reason = str(error).strip().partition("\n")[0]
                folder = self._wandb_init.get("dir") or "."
                logger.warning(
                    "W&B cannot be used (%s): the run goes on and is recorded offline; later: wandb sync %s",
                    reason, os.path.relpath(os.path.join(folder, "wandb", "offline-run-*")),
                )  # fmt: skip
                wandb.teardown()
                WandbRun.offline = True  # the next row's run would wait anew
        return self._begun()

    def _begun(self) -> Any:
        if WandbRun.offline:
            self._wandb_init["mode"] = "offline"
        found = WandbLogger.experiment.fget  # type: ignore[attr-defined]
        return found(self)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As Lightning's; what cannot be logged is lost, the run is not."""
        try:
            super().log_metrics(metrics, step)
        except Exception as error:
            self._failed(error)

    @rank_zero_only
    def record(
        self,
        numbers: Mapping[str, float],
        tables: Mapping[str, Table],
        images: Mapping[str, Any],
        scores: Path | None = None,
    ) -> None:
        """Log what is known at a stage's end, and close the run.

        Args:
            numbers: by metric name.
            tables: by name; cells may be pictures (PIL).
            images: charts (PIL), by name.
            scores: the scored candidates, sent where that was asked for.
        """
        try:
            run = self.experiment
            run.log(dict(numbers))
            self._record_files(run, tables, images, scores)
            self._end(run)
        except Exception as error:
            self._failed(error)
        self._experiment = None

    def _end(self, run: Any) -> None:
        try:
            run.finish()
        except TimeoutError:  # of finish_timeout
            folder = os.path.relpath(Path(run.dir).parent)
            logger.warning(
                "W&B does not answer; the run has ended all the same, and its numbers are recorded: later "
                "wandb sync --no-skip-online %s", folder,
            )  # fmt: skip
            WandbRun.offline = True  # the next row's run would wait anew

    def _record_files(
        self, run: Any, tables: Mapping[str, Table], images: Mapping[str, Any], scores: Path | None
    ) -> None:
        """What W&B wants its server for, even to begin with."""
        import wandb

        try:
            told: dict[str, Any] = {}
            for name, (columns, rows) in tables.items():
                cells = [[_cell(value) for value in row] for row in rows]
                told[name] = wandb.Table(columns=list(columns), data=cells)
            told |= {name: wandb.Image(picture) for name, picture in images.items()}
            run.log(told)
            if self.log_scores and scores is not None and scores.is_file():
                artifact = wandb.Artifact(f"scores-{run.id}", type="scores")
                artifact.add_file(str(scores))
                run.log_artifact(artifact)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("W&B takes no tables and pictures of this run (%s)", reason)

    def _failed(self, error: Exception) -> None:
        if not self._silent:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("W&B logs nothing more of this run (%s); the run goes on", reason)
            self._silent = True


def _cell(value: Any) -> Any:
    """Pictures as W&B has them."""
    from PIL.Image import Image

    if isinstance(value, Image):
        import wandb

        return wandb.Image(value)
    return value
