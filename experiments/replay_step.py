"""The step behind ``make replay``, computed again from the batch that the run has kept.

The stage is built from its own settings with the weights from before the step, and learns from this one
batch: as it ran, in float32 and in float64, so that what is too large for a precision can be told from what
is wrong with the numbers. Nothing in the run folder changes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.checkpoints import LAST, unreadable
from callbacks.first_nonfinite import Enough, FirstNonFinite, Found
from experiments import build, messages
from experiments.calibrate import LENGTHS
from experiments.errors import UserError
from experiments.replay import kept
from experiments.source_graph import PACKAGES, REPO
from experiments.stage import build_data, build_module, quiet
from experiments.trainers import make_trainer
from lightning_modules.errors import ModelError

SINGLE, DOUBLE = "32-true", "64-true"
NAMES = {SINGLE: "float32", DOUBLE: "float64"}
LARGEST = 3  # gradients that are told


def replay(file: Path) -> None:
    """Print what the batch holds, and what its step comes to in each precision.

    Raises:
        UserError: the file, or what belongs to it, is not there or does not fit.
    """
    quiet()
    (note, job), tensors = kept(file), load_file(file)
    batch = rebuilt(note["batch"], tensors)
    weights, of_what = _weights(file.parent, note)
    messages.put(
        f"{job['label']}: step {note['global_step']} (epoch {note['epoch']}, batch "
        f"{note['batch_index']}, rank {note['rank']}), whose loss was {note['loss']}"
    )
    for line in (*_shown(tensors), of_what):
        messages.put(f"  {line}")
    ran = str(job["spec"]["trainer"].get("precision") or SINGLE)
    ran = SINGLE if ran == "32" else ran
    found: dict[str, Found] = {}
    for precision in dict.fromkeys((ran, SINGLE, DOUBLE)):
        step = _step(job, note, batch, weights, precision)
        if step is None:
            messages.put("its weights have a precision of their own: no other is tried")
            break
        found[NAMES.get(precision, precision)] = step
        for line in _told(step):
            messages.put(f"{NAMES.get(precision, precision)}: {line}")
    messages.put(_conclusion(found))


def rebuilt(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A batch as it was.

    Args:
        node: how it is put together, from the note.
        tensors: by their dotted places.

    Raises:
        UserError: a part was not kept, or is of a class that is not ours.
    """
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "value" in node:
        return node["value"]
    if "items" in node:
        items = [rebuilt(inner, tensors) for inner in node["items"]]
        return tuple(items) if node["tuple"] else items
    if "fields" not in node:
        raise UserError(f"the batch holds {node.get('lost')}, which could not be kept")
    parts = {name: rebuilt(inner, tensors) for name, inner in node["fields"].items()}
    if "type" not in node:
        return parts
    kind = build.locate(node["type"]) if node["type"].partition(".")[0] in PACKAGES else None
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise UserError(f"the batch is a {node['type']}, which is no batch of ours")
    return kind(**parts)


def _weights(folder: Path, note: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Weights and buffers by name, and a line about them."""
    found: dict[str, Tensor] = {}
    last = folder / LAST
    if last.is_file() and not unreadable(last):
        found = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    kept = folder / "nonfinite.weights.safetensors"
    if note["weights"] and kept.is_file():
        found = {**found, **load_file(kept)}
        wrong = ", ".join(note["weights_not_finite"])
        state = f"not finite any more: {wrong}" if wrong else "all of them finite"
        return found, f"weights: those before the step, {state}"
    if found:
        return found, "weights: those of last.ckpt, since these were spread over devices"
    return found, "weights: those at the start of the fit, since none were kept"


def _shown(tensors: dict[str, Tensor]) -> Iterator[str]:
    """A line a tensor of the batch: shape, kind, range, and what is not finite."""
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        line = f"{name} {tuple(tensor.shape)} {kind}"
        if tensor.numel() and not tensor.is_complex():
            values = tensor.double()
            finite = values[values.isfinite()]
            ends = f"{finite.min():g} to {finite.max():g}" if finite.numel() else "nothing finite"
            line += f": {ends}" if tensor.numel() > 1 else f": {values.item():g}"
            wrong = tensor.numel() - finite.numel()
            line += f", {wrong} not finite" if wrong else ""
        yield line


def _step(
    job: dict[str, Any],
    note: dict[str, Any],
    batch: Any,
    weights: dict[str, Tensor],
    precision: str,
) -> Found | None:
    """The step in one precision; None where the module's weights have their own."""
    spec, launch = job["spec"], dict(job["launch"])
    torch.set_num_threads(launch["threads"] or os.cpu_count() or 1)
    if launch["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        messages.say("there is no GPU here: computed on the CPU")
        launch["accelerator"] = "cpu"
    launch |= {"devices": 1, "num_nodes": 1, "strategy": "auto", "micro_batch_size": None}
    trainer = {k: v for k, v in spec["trainer"].items() if k not in LENGTHS}
    trainer |= {"max_epochs": note["epoch"] + 1, "precision": precision, "detect_anomaly": True}
    alone = {**job, "launch": launch, "logger": None, "callbacks": None}
    alone["spec"] = {**spec, "trainer": trainer}
    pl.seed_everything(spec["seed"], verbose=False)
    data = build_data(alone)
    module = build_module(next(iter(spec["modules"].values())), alone, data)
    if launch.get("activation_checkpointing"):
        module.checkpoint_activations()
    probe = FirstNonFinite(weights, note["global_step"], note["epoch"], REPO)
    # Each step's dropout is drawn from a seed of its own, which the note has.
    seed = note["torch_seed"]
    setattr(module, "on_train_batch_start", lambda *_: torch.manual_seed(seed))  # noqa: B010
    kept: Any = [batch]
    loader: Any = DataLoader(kept, batch_size=None, collate_fn=lambda one: one)
    setattr(data, "train_dataloader", lambda: loader)  # noqa: B010
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        runner = make_trainer(Path(folder), alone, data, module, [probe])
        runner.limit_val_batches = 0
        if runner.precision != precision and precision == DOUBLE:
            return None
        try:
            runner.fit(module, datamodule=data)
        except Enough:
            pass
        except (UserError, ModelError):
            raise
        except Exception as error:
            if probe.found.last is None:  # nothing was computed
                raise
            probe.found.raised = f"{type(error).__name__}: {error}"
    return probe.found


def _told(step: Found) -> Iterator[str]:
    if step.raised:
        yield f"the step ends with {step.raised.partition(chr(10))[0]}"
    if step.loss is not None:
        largest = sorted(step.gradients.items(), key=lambda g: (g[1] == g[1], -g[1]))[:LARGEST]
        told = ", ".join(f"{name} {norm:.3g}" for name, norm in largest)
        yield f"loss {step.loss:.6g}, gradient norm {step.norm:.3g} ({told})"
    if step.module:
        yield f"first not finite: {step.module}"
    elif step.loss is not None and not abs(step.loss) < float("inf"):
        yield f"first not finite: the loss itself, behind {step.last or 'no module'}, whose answer is finite"
    wrong = [name for name, norm in step.gradients.items() if not norm < float("inf")]
    if wrong:
        many = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield f"going backward: the gradient of {wrong[0]}{many}"
    if step.operation:
        yield f"going backward, the first nan is made by {step.operation}"


def _conclusion(found: dict[str, Found]) -> str:
    fine = [name for name, step in found.items() if step.finite]
    wrong = [name for name in found if name not in fine]
    if fine and wrong:
        return (
            f"it is finite in {' and '.join(fine)}, not in {' and '.join(wrong)}: numbers too large for that "
            "precision; take a higher one, a lower learning rate, or clip gradients"
        )
    if wrong:
        return (
            f"it is not finite in {' and '.join(wrong)}: what stands above as first has to be "
            "mended, no precision helps"
        )
    return "it is finite here in every precision: what differs is the device, or weights that were not kept"
