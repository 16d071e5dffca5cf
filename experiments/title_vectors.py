"""The titles of a catalogue as vectors, for ``make beyond``, which does not import torch itself.

``python -m experiments.title_vectors FOLDER TO`` writes those of a prepared folder to TO.npy, or to TO.txt
why there are none. Variable: ENCODER (a folder with a sentence encoder; without it MiniLM, a download of
83 MB).

Legend: I items in the catalogue, d width.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataSourceError
from datamodules.prepared import Prepared
from experiments.command import exit_status
from experiments.messages import say
from experiments.processes import in_process

if TYPE_CHECKING:
    from numpy.typing import NDArray


def title_vectors(prepared: Path) -> tuple[NDArray[np.float32] | None, str]:
    """(I, d) of a prepared folder's titles, zero where there is none; or None, and a line that says why.

    Computed once for a catalogue and an encoder: see ``encode_texts``.
    """
    say("sentence embeddings of titles ...")
    with TemporaryDirectory() as scratch:
        target = Path(scratch) / "titles"
        in_process("experiments.title_vectors", [str(prepared), str(target)])
        vectors = target.with_suffix(".npy")
        if vectors.is_file():
            return np.load(vectors), ""
        why = target.with_suffix(".txt").read_text(encoding="utf-8")
    return None, (
        f"Diversity (text embeddings) is not known: {encoder_name()}, the sentence encoder, could not be had "
        f"({why}). Run the command once where there is a network, or name a folder with one: ENCODER=FOLDER."
    )


def encoder_name() -> str:
    """What remarks call the encoder."""
    return _chosen() or "MiniLM"


def _chosen() -> str:
    return os.environ.get("ENCODER", "").strip()


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _write(Path(argv[0]), Path(argv[1])))


def _write(prepared: Path, target: Path) -> None:
    import torch  # for this process alone

    from lightning_modules.item_texts import item_texts
    from lightning_modules.llm import SentenceEncoderSpec, encode_texts

    spec = SentenceEncoderSpec(_chosen()) if _chosen() else SentenceEncoderSpec()
    titles = item_texts(Prepared(prepared).items, ["title"])  # (I,)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        vectors = encode_texts(spec, titles, device)  # (I, d)
    except (DataSourceError, OSError) as error:
        # The remedy of a stage, which sets its encoder in another way, is not told.
        reason = " ".join(str(error).partition("What to do:")[0].split()).rstrip(".:")
        target.with_suffix(".txt").write_text(reason, encoding="utf-8")
        return
    np.save(target.with_suffix(".npy"), vectors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
