"""Stops a run where it can go on from, when it is asked to, and goes on there exactly.

A fit stops behind an optimizer step, all ranks behind the same one, with ``last.ckpt`` of that moment; the
batches of the epoch that were learned from do not come again. A test or a prediction has nothing to save and
stops behind a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks import stop_request
from callbacks.stop_request import Stopped


class Preemption(pl.Callback):
    """Last of a trainer's callbacks, so that the others have seen the batch that it stops behind.

    The signal's handler sets a flag; what all ranks must do together is done between two batches, where all
    of them are at the same place. A fit that validates goes on: the end of the epoch is saved then.

    Args:
        folder: of the run, where a fit leaves ``last.ckpt``.
        signals: that ask for a stop; none listens to no more than is listened to already.
    """

    def __init__(self, folder: Path, signals: tuple[Any, ...] = ()) -> None:
        self.folder, self.signals = Path(folder), signals
        self._agreed = False
        self._micro_batches = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on behind the last batch of the checkpoint.

        The loader may have been asked for batches before the checkpoint was loaded; it begins again.
        """
        self._listen()
        self._micro_batches = trainer.accumulate_grad_batches
        loop = trainer.fit_loop
        if not loop.is_resuming or loop._data_fetcher is None:
            return
        if loop.restarted_on_epoch_end:
            # With max_steps Lightning would end this epoch once more, and count it twice.
            loop._restarting = loop.epoch_loop.restarting = False
            loop.reset_restart_stage()
            loop.epoch_progress.increment_completed()
        sampler: Any = trainer.train_dataloader.sampler  # type: ignore[union-attr]
        epochs: Any = loop.epoch_progress.current
        batches: Any = loop.epoch_loop.batch_progress.current
        sampler.set_epoch(epochs.processed)
        sampler.skip = batches.processed if loop.restarted_mid_epoch else 0
        iter(loop._data_fetcher)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch before is saved: stop before this one."""
        if self._all_asked(trainer):
            raise Stopped

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop behind a whole optimizer step.

        Not where a validation is due: a fit that resumes there would leave it out. Nor behind the last of
        ``max_steps``: one that resumes there is over, and would never close its epoch.
        """
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or not self._all_asked(trainer):
            return
        fetcher: Any = trainer.fit_loop._data_fetcher
        if loop._is_training_done or loop._should_check_val_fx(fetcher):
            return
        trainer.save_checkpoint(self.folder / "last.ckpt")
        raise Stopped

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._listen()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._listen()

    def on_test_batch_end(self, *unused: Any) -> None:
        """Stop, without the other ranks: they may have fewer batches, and hear the signal themselves."""
        if stop_request.asked():
            raise Stopped

    def on_predict_batch_end(self, *unused: Any) -> None:
        """As in a test; what was generated is in its file."""
        if stop_request.asked():
            raise Stopped

    def state_dict(self) -> dict[str, Any]:
        """How many micro batches make a step: what a checkpoint counts are micro batches."""
        return {"micro_batches": self._micro_batches}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the batches of the epoch as this launch does, where its micro batches are others."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        then, now = state.get("micro_batches", 1), trainer.accumulate_grad_batches
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None or then == now:
            return
        counts = loops["epoch_loop.batch_progress"]
        more = counts["current"]["processed"] // then * now - counts["current"]["processed"]
        for part in ("current", "total"):
            counts[part] = {name: count + more for name, count in counts[part].items()}

    def _listen(self) -> None:
        """Again: Lightning has put a handler of its own before ours, which talks to other ranks at once."""
        stop_request.listen(*self.signals)

    def _all_asked(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if not self._agreed:
            self._agreed = stop_request.asked()
            if trainer.world_size > 1:
                self._agreed = trainer.strategy.reduce_boolean_decision(self._agreed, all=False)
        return self._agreed
