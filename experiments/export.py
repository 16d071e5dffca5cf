"""The command behind ``make export``: a finished language model for plain PEFT and plain transformers.

``python -m experiments.export [NAME [key=value ...]]``; NAME and overrides may also come from the environment
(NAME, ARGS), as for ``experiments.run``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.sources import cache_root
from experiments import artifacts, build, config
from experiments.errors import UserError
from experiments.messages import print_error, say, short
from experiments.run import request


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen)."""
    try:
        name, overrides = request(list(argv))
        export(config.load(name, overrides))
    except (UserError, DataSourceError, DataFormatError, ValueError) as error:
        print_error(error)
        return 2
    return 0


def export(experiment: config.Experiment) -> None:
    """Export every fit of a language model.

    Raises:
        UserError: there is none, or it has not been run to its end.
    """
    stages = [s for s in artifacts.plan(experiment, cache_root()) if _is_language_model(s.spec)]
    if not stages:
        raise UserError(f"{experiment.name} trains no language model: there is nothing to export")
    for stage in stages:
        if stage.folder is None or not stage.done:
            raise UserError(
                f"{experiment.name} has not been run to its end ({stage.name}: {stage.why}): "
                f"make exp NAME={experiment.name}"
            )
        (node,) = stage.spec["modules"].values()
        data = build.build(stage.spec["data"])
        module: Any = build.build_on(node, data, **stage.inputs)
        module.load_weights(stage.folder / "best.ckpt")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for kind, folder in module.export(stage.folder / "export", device).items():
            say(f"{stage.name}, {kind}: {short(folder)}")


def _is_language_model(spec: dict[str, Any]) -> bool:
    return spec["run"] == "fit" and any("llm" in node for node in spec["modules"].values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
