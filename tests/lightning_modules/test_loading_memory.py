"""Weights stream onto the device: no load holds a second copy of a model, quantized or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.llm.random_models import RandomModel
from tests.conftest import REPO

# The most memory of its own (mapped files are not) that a process had while it loaded, above that before.
LOAD = """
import sys, threading, time
import torch
from lightning_modules.llm.backbones import load_causal_lm
from lightning_modules.llm.precision import QLoRAPrecision
from lightning_modules.llm.specs import BackboneSpec

folder, quantization = sys.argv[1], sys.argv[2] or None
spec = BackboneSpec(folder, dtype="float32", quantization=quantization)
plugin = QLoRAPrecision.for_spec(spec) if quantization else None
device = torch.device("cpu")
config = plugin.quantization_config(device) if plugin else None
torch.zeros(8).sum()

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

import transformers.models.llama.modeling_llama, bitsandbytes, accelerate
most, done = [own()], False

def watch():
    while not done:
        most.append(own())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = load_causal_lm(spec, device, config)
done = True
thread.join()
print(max(most) - most[0], sum(p.numel() for p in model.parameters()))
"""

# Without the C library's habit of keeping what was freed, which would count as the load's own.
GIVEN_BACK = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 million weights, 300 MB."""
    folder = tmp_path_factory.mktemp("model")
    RandomModel(width=1024, layers=8, longest=1024).write(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("quantization", "bytes_a_weight"), [("", 4.0), ("nf4-dq", 0.6)])
def test_a_load_takes_little_more_than_the_model_itself(
    model: Path, quantization: str, bytes_a_weight: float
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(model), quantization],
        cwd=REPO, capture_output=True, text=True, check=False, env=GIVEN_BACK,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    most = int(done.stdout.split()[-2])
    size = (model / "model.safetensors").stat().st_size  # 4 bytes a weight
    allowed = bytes_a_weight / 4 * size
    print(f"{quantization or 'float32'}: {most / 2**20:.0f} of {size / 2**20:.0f} MiB")
    assert most < 1.25 * allowed + 60 * 2**20
