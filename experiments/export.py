"""The command behind ``make export``: finished models as files that plain tools read, each with a model card.

Language models: a PEFT adapter and merged weights for plain transformers. Collaborative models: ONNX,
safetensors and id maps. ``python -m experiments.export [NAME [key=value ...]]``; NAME and overrides may also
come from the environment (NAME, ARGS), as for ``experiments.run``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.sources import cache_root
from experiments import artifacts, build, config
from experiments.artifacts import PlannedStage
from experiments.errors import UserError
from experiments.exported import write_collaborative
from experiments.loaded import asked_of
from experiments.messages import print_error, say, short
from experiments.model_card import write_card
from experiments.recommend import tests
from experiments.run import request
from lightning_modules.next_item import NextItemModule

LANGUAGE_MODEL = {
    "adapter": "what was trained, for plain PEFT",
    "merged": "the whole language model, for plain transformers",
}


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen)."""
    try:
        name, overrides = request(list(argv))
        export(config.load(config.full_name(name), overrides))
    except (UserError, DataSourceError, DataFormatError, ValueError) as error:
        print_error(error)
        return 2
    return 0


def export(experiment: config.Experiment) -> None:
    """Export every fit of a language model, and every collaborative model that was tested by itself.

    Raises:
        UserError: there is none, or it has not been run to its end.
    """
    tested = [t for t in tests(experiment) if _is_collaborative(t) and "weights" in t.inputs]
    planned = artifacts.plan(experiment, cache_root())
    fits = [s for s in planned if _is_language_model(s.spec)]
    if not tested and not fits:
        raise UserError(
            f"{experiment.name} tests no collaborative model that was trained, and trains no language model: "
            "there is nothing to export"
        )
    for stage in fits:
        _export_language_model(experiment, stage, planned)
    weights: set[str] = set()
    for test in tested:
        if test.inputs["weights"] not in weights:  # one model may be tested twice
            weights.add(test.inputs["weights"])
            _export_collaborative(experiment, test, planned)


def _export_language_model(
    experiment: config.Experiment, stage: PlannedStage, planned: Sequence[PlannedStage]
) -> None:
    folder = _finished(experiment, stage)
    (node,) = stage.spec["modules"].values()
    data = build.build(stage.spec["data"])
    module: Any = build.build_on(node, data, **stage.inputs)
    module.load_weights(folder / "best.ckpt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    written = module.export(folder / "export", device)
    for kind, place in written.items():
        say(f"{stage.name}, {kind}: {short(place)}")
    files = {kind: LANGUAGE_MODEL[kind] for kind in written}
    notes = ["What the language model learned before this training is its maker's to tell."]
    if module.llm.rounding == "gptq" and "adapter" in written:
        kept = ", which `merged` has" if "merged" in written else ""
        notes.append(
            f"The adapter was trained on weights in 4 bits that were rounded together (GPTQ){kept}: with the "
            "published model's own it answers otherwise."
        )
    _card(experiment, stage, planned, data, files, notes)


def _export_collaborative(
    experiment: config.Experiment, test: PlannedStage, planned: Sequence[PlannedStage]
) -> None:
    fit = next(
        (s for s in planned if str(s.folder) == str(Path(test.inputs["weights"]).parent)), None
    )
    if fit is None:
        raise UserError(f"{test.name} reads weights from outside of the experiment: export those")
    folder = _finished(experiment, fit)
    model = asked_of(experiment, test)
    files, notes = write_collaborative(model, folder / "export")
    for name in files:
        say(f"{fit.name}: {short(folder / 'export' / name)}")
    for note in notes:
        say(f"  {note}")
    _card(experiment, fit, planned, model.data, files, notes)


def _card(
    experiment: config.Experiment, fit: PlannedStage, planned: Sequence[PlannedStage], data: Any,
    files: dict[str, str] | Any, notes: Sequence[str],
) -> None:  # fmt: skip
    assert fit.folder is not None
    reads = str(fit.folder / "best.ckpt")
    finished = [
        s for s in planned
        if s.spec["run"] == "test" and s.done and reads in s.inputs.values()
    ]  # fmt: skip
    counts = data.prepared.manifest.get("counts", {})
    path = write_card(fit.folder / "export", experiment, fit, finished, counts, files, notes)
    say(f"{fit.name}, model card: {short(path)}")


def _finished(experiment: config.Experiment, stage: PlannedStage) -> Path:
    if stage.folder is None or not stage.done:
        raise UserError(
            f"{experiment.name} has not been run to its end ({stage.name}: {stage.why}): "
            f"make exp NAME={experiment.name}"
        )
    return stage.folder


def _is_language_model(spec: dict[str, Any]) -> bool:
    return spec["run"] == "fit" and any("llm" in node for node in spec["modules"].values())


def _is_collaborative(test: PlannedStage) -> bool:
    (node,) = test.spec["modules"].values()
    kind = build.locate(node["_target_"])
    return isinstance(kind, type) and issubclass(kind, NextItemModule)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
