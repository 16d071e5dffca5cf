"""A finished collaborative model as files that need nothing of ours: ONNX, safetensors, id maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import polars as pl
from safetensors.torch import save_file

from datamodules.versioning import value_digest
from experiments.errors import UserError
from experiments.onnx_graph import (
    TOLERANCE,
    inputs_of,
    largest_difference,
    longest,
    write_onnx,
)
from experiments.recommender import Recommender
from lightning_modules.next_item import NextItemModule

FILES = {
    "model.onnx": "ids in, scores of all items out; any number of rows",
    "model.safetensors": "the trained weights and buffers, by the names of the module",
    "model.json": "the module, its settings, and what the inputs mean",
    "items.parquet": "internal item ids (columns of the scores), raw ids and titles",
    "users.parquet": "internal user ids and raw ids",
}


def write_collaborative(model: Recommender, folder: Path) -> tuple[Mapping[str, str], list[str]]:
    """Write everything that can be written.

    Args:
        model: finished; its module ranks a catalogue by itself.
        folder: made if need be; files of the same names are overwritten.

    Returns:
        What each file is, by name; and what could not be written, and why.

    Raises:
        UserError: the method has no graph and no weights of its own, or ONNX Runtime's scores are wrong.
    """
    module = model.module
    if not isinstance(module, NextItemModule):
        raise UserError(
            f"{type(module).__name__} is computed from the training data or a language model's: it has no "
            "weights of its own to export"
        )
    model.recommend(next(iter(model.users)), 1)  # what is made on a device is there afterwards
    module.cpu().eval()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = ["model.safetensors", "model.json", "items.parquet"]
    catalog = model.data.catalog
    pl.DataFrame({
        "internal_id": range(1, len(catalog) + 1), "item_id": catalog["item_id"].cast(pl.String),
        "title": catalog["title"],
    }).write_parquet(folder / "items.parquet")  # fmt: skip
    if module.reads_users:
        users = pl.DataFrame({"internal_id": model.users.values(), "user_id": model.users.keys()})
        users.write_parquet(folder / "users.parquet")
        written.append("users.parquet")
    notes = []
    told: dict[str, dict[str, str]] = {"inputs": {}, "outputs": {}}
    try:
        write_onnx(module, folder / "model.onnx")
    except UserError as error:
        notes.append(str(error))
    else:
        worst = largest_difference(module, folder / "model.onnx", model.data.histories)
        notes.append(
            f"ONNX Runtime's scores differ from torch's by at most {worst:.1e} of the largest (allowed: "
            f"{TOLERANCE:.0e})."
        )
        written.insert(0, "model.onnx")
        what = {
            "user": "int64 (rows,): internal user ids of users.parquet",
            "history": f"int64 (rows, {longest(module)}): internal item ids, oldest first, 0 behind the last",
        }
        told["inputs"] = {name: what[name] for name in inputs_of(module)}
        told["outputs"] = {
            "scores": f"float32 (rows, {len(catalog) + 1}): of each internal item id, -inf in column 0; what "
            "was seen is not left out"
        }
    (node,) = model.stage.spec["modules"].values()
    about = {
        "experiment": model.name, "module": node, "items": len(catalog), **told,
        "catalogue": value_digest(catalog["item_id"].cast(pl.String).to_list()),
    }  # fmt: skip
    text = json.dumps(about, indent=1, ensure_ascii=False, default=str)
    (folder / "model.json").write_text(text + "\n", encoding="utf-8")
    return {name: FILES[name] for name in FILES if name in written}, notes
