"""A few prompts, answers, histories and scores of a stage, as people read them, with small pictures.

``samples.NAME.json`` is a list of records, of each ``kind`` (train, score, text) at most ``most``, taken
evenly over a pass: ``prompt`` and ``answer`` (what a language model read and should say, or said), ``row``
and ``user`` as in the scores file, ``history`` and ``items`` (title, score, whether it is the target,
picture), ``place`` of the target and ``label``. What a record does not have is left out.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch

MOST, ITEMS, EVENTS = 6, 5, 8  # records of a stage, items and newest events of a record
LETTERS = 3_000  # of a prompt or an answer
SIDE = 96  # pixels of a picture
_REPEATED = re.compile(r"((?:<[^<>\s]{1,40}>)+?)\1{3,}")


class Samples(lightning.Callback):
    """Writes what the first process sees; of a fit, rows of its first batches.

    Args:
        folder: of the stage.
        name: of the row that is tested, or of the stage.
        pictures: whether the items' pictures belong to it (the method reads them).
        most: records.
    """

    def __init__(self, folder: Path, name: str, pictures: bool = False, most: int = MOST) -> None:
        self.path = Path(folder) / f"samples.{name}.json"
        self.pictures, self.most = pictures, most
        self.records: list[dict[str, Any]] = []
        self._written = 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prompts and the answers that are learned."""
        room = self.most - len(self.records)
        if trainer.is_global_zero and room > 0 and _tokenizer(pl_module) is not None:
            rows = range(min(room, len(batch)))
            texts = (learned(_tokenizer(pl_module), batch, row) for row in rows)
            self._keep({"kind": "train", **text} for text in texts if text)

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *unused: Any,
    ) -> None:
        """Some rows with their best items; texts that were written for them."""
        if not trainer.is_global_zero:
            return
        self._texts(trainer, pl_module)
        batches = max(1, int(sum(trainer.num_test_batches)))
        every, each = max(1, batches // self.most), -(-self.most // batches)
        if batch_idx % every == 0:
            rows = range(min(each, len(outputs.batch)))
            self._keep(self._scored(trainer, pl_module, outputs, row) for row in rows)

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, *unused: Any
    ) -> None:
        """Texts that were written."""
        if trainer.is_global_zero:
            self._texts(trainer, pl_module)

    def _texts(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Prompts, what was written and the pictures that were shown."""
        generations = getattr(pl_module, "generations", None)
        if generations is None:
            return
        tokenizer = _tokenizer(pl_module)
        made = []
        for prompt, answer, items in generations.take_samples():
            record: dict[str, Any] = {"kind": "text"}
            record |= {"prompt": read(tokenizer, prompt), "answer": read(tokenizer, answer)}
            if items:
                record["items"] = self._items(items, trainer, pl_module)
            made.append(record)
        self._keep(made)

    def _scored(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, row: int
    ) -> dict[str, Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch, tokenizer = outputs.batch, _tokenizer(pl_module)
        record: dict[str, Any] = {
            "kind": "score",
            "row": int(batch.row[row]),
            "user": str(data.raw_users(batch.user[row : row + 1].cpu().numpy())[0]),
        }
        if batch.tokens is not None and tokenizer is not None:
            record["prompt"] = read(tokenizer, _real(batch, row))
        length = int(batch.length[row])
        events = batch.history[row, max(0, length - EVENTS) : length].tolist()
        record["history"] = titles_of(events, data)
        items, scores = best(outputs, row)
        target = int(batch.target[row])
        record["items"] = [
            {**item, "score": score, "target": number == target}
            for item, score, number in zip(
                self._items(items, trainer, pl_module), scores, items, strict=True
            )
        ]
        if outputs.counts is None:
            record["label"] = bool(batch.label[row])
        else:
            record["place"] = int(outputs.counts.above[row]) + 1
        return record

    def _items(
        self, items: Sequence[int], trainer: lightning.Trainer, pl_module: Any
    ) -> list[dict[str, Any]]:
        """Titles of internal ids, and the pictures that the method shows them with, where it shows any."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        own = getattr(pl_module, "shown", None)  # a probe may show others than the items' own
        images = (own if hasattr(own, "picture") else data.item_images) if self.pictures else None
        return [
            {"title": title}
            | (
                {"picture": small(images.picture(i))}
                if images is not None and images.mask[i]
                else {}
            )
            for i, title in zip(items, titles_of(items, data), strict=True)
        ]

    def _keep(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records as far as there is room, and write them all."""
        for record in records:
            room = sum(r["kind"] == record["kind"] for r in self.records) < self.most
            if room:
                self.records.append(record)
        if len(self.records) > self._written:
            self._written = len(self.records)
            whole = self.path.with_name(f".{self.path.name}.part")
            whole.write_text(json.dumps(self.records, ensure_ascii=False), encoding="utf-8")
            whole.replace(self.path)


def titles_of(items: Sequence[int], data: Any) -> list[str]:
    """Of internal ids."""
    if not items:
        return []
    found = data.catalog["title"].gather([item - 1 for item in items])
    return [title or "(no title)" for title in found]


def best(outputs: Any, row: int) -> tuple[list[int], list[float]]:
    """The best items of a row and their scores, best first; the target is always one of them."""
    batch, target = outputs.batch, int(outputs.batch.target[row])
    if outputs.counts is None:
        return [target], [float(outputs.scores[row, 0])]
    if outputs.scores is None:
        items = outputs.counts.top_items[row].cpu().numpy()
        scores = outputs.counts.top_scores[row].float().cpu().numpy()
    else:
        items = batch.candidates[row].cpu().numpy()
        scores = outputs.scores[row].float().cpu().numpy()
        order = np.argsort(-scores, kind="stable")
        items, scores = items[order], scores[order]
    found = [(int(i), float(s)) for i, s in zip(items, scores, strict=True) if i > 0]
    kept = found[:ITEMS]
    if target not in [i for i, _ in kept]:
        kept = [*kept[: ITEMS - 1], (target, float(outputs.counts.target_score[row]))]
    return [i for i, _ in kept], [s for _, s in kept]


def learned(tokenizer: Any, batch: Any, row: int) -> dict[str, str]:
    """A row's prompt and the answer that carries the loss; nothing of batches without tokens."""
    if getattr(batch, "tokens", None) is None:
        return {}
    found = {"prompt": read(tokenizer, _real(batch, row))}
    answers = getattr(batch, "answers", None)
    if answers is not None:
        told = [i for i in answers[row].tolist() if i >= 0]
        found["answer"] = read(tokenizer, told)
    elif getattr(batch, "label", None) is not None:
        found["answer"] = "liked" if bool(batch.label[row]) else "not liked"
    return found


def _real(batch: Any, row: int) -> list[int]:
    """A row's tokens without padding."""
    ids: torch.Tensor = batch.tokens[row][batch.token_mask[row].bool()]
    return ids.tolist()


def _tokenizer(pl_module: Any) -> Any:
    """Of a language model; None of other methods."""
    return getattr(pl_module, "tokenizer", None) if hasattr(pl_module, "llm") else None


def read(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, marks included; what stands many times in a row (a picture's places) is counted."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
    text = _REPEATED.sub(lambda m: f"{m[1]} ×{len(m[0]) // len(m[1])} ", text)
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} …"


def small(picture: Any) -> str:
    """A picture in few bytes, as a ``data:`` address."""
    copy = picture.convert("RGB")
    copy.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
