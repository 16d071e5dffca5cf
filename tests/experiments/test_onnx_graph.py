"""Collaborative models as ONNX graphs: ONNX Runtime's scores are torch's, for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.types import Histories
from experiments.errors import UserError
from experiments.onnx_graph import largest_difference, write_onnx
from lightning_modules.bert4rec import BERT4RecModule
from lightning_modules.caser import CaserModule
from lightning_modules.fpmc import FPMCModule
from lightning_modules.gru4rec import GRU4RecModule
from lightning_modules.hstu import HSTUModule
from lightning_modules.mf import BPRMFModule
from lightning_modules.neumf import NeuMFModule
from lightning_modules.next_item import NextItemModule
from lightning_modules.nextitnet import NextItNetModule
from lightning_modules.sasrec import SASRecModule

pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
I, U, T = 40, 20, 8  # noqa: E741


@pytest.fixture(scope="module")
def histories() -> Histories:
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 15, U)  # some above T
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    n = int(offsets[-1])
    items = draw.integers(1, I + 1, n).astype(np.int32)
    return Histories(offsets, items, np.zeros(n, np.int8), np.arange(n), I)


def drawn(module: NextItemModule) -> NextItemModule:
    """Weights so large that a wrong place or a missing mask is seen."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


MAKERS: dict[str, Callable[[], NextItemModule]] = {
    "sasrec": lambda: SASRecModule(I, max_length=T, hidden_size=8),
    "sasrec_original": lambda: SASRecModule(
        I, max_length=T, hidden_size=8, positions="reversed", norm="original", tied=False
    ),
    "bert4rec": lambda: BERT4RecModule(I, max_length=T, hidden_size=8),
    "gru4rec": lambda: GRU4RecModule(I, max_length=T),
    "hstu": lambda: HSTUModule(I, max_length=T, hidden_size=8, time_bias=False),
    "caser": lambda: CaserModule(I, U, max_length=T),
    "nextitnet": lambda: NextItNetModule(I, max_length=T),
    "fpmc": lambda: FPMCModule(I, U),
    "bpr": lambda: BPRMFModule(I, U),
    "neumf": lambda: NeuMFModule(I, U),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_graph_computes_what_the_module_does(
    name: str, histories: Histories, tmp_path: Path
) -> None:
    module, path = drawn(MAKERS[name]()), tmp_path / "model.onnx"
    module.on_predict_epoch_start()  # which keeps the table
    module.on_predict_epoch_end()
    write_onnx(module, path)
    assert largest_difference(module, path, histories) <= 1e-5
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        feed = {
            given.name: np.ones((rows, *given.shape[1:]), np.int64)
            for given in session.get_inputs()
        }
        (scores,) = session.run(None, feed)
        assert scores.shape == (rows, I + 1)
        assert np.isneginf(scores[:, 0]).all()


def test_a_graph_of_other_weights_is_found_out(histories: Histories, tmp_path: Path) -> None:
    module = drawn(SASRecModule(I, max_length=T, hidden_size=8))
    write_onnx(module, tmp_path / "model.onnx")
    with torch.no_grad():
        module.network.item_embedding.weight[5] += 0.1
    with pytest.raises(UserError, match="is wrong: its scores differ from torch's"):
        largest_difference(module, tmp_path / "model.onnx", histories)


def test_times_are_no_ids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HSTUModule reads the times of events"):
        write_onnx(HSTUModule(I, max_length=T), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
