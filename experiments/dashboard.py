"""The command behind ``make dashboard``: the project's W&B workspace, as code (wandb-workspaces).

Without an account it writes ``reports/wandb_workspace.json`` beside the run folders: what would be sent.
Variables: PUBLISH=1 sends it (W&B needs a key for that), WANDB_PROJECT and WANDB_ENTITY as for runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import artifacts
from experiments.command import exit_status, switched, write_whole
from experiments.errors import UserError
from experiments.messages import put, say, short

NAME = "llmrec: quality, crossover, cost, health"
GROUPS = ("all", "cold_item", "warm_item", "cold_user", "warm_user")
QUALITY = ("ndcg@10", "auc")  # of ranked rows, of labelled ones
CURVES = ("train/loss", "val/loss", "val/all/ndcg@10", "val/all/auc")
COSTS = {
    "throughput/users_per_second": "users a second",
    "stage/seconds": "seconds of the test",
    "memory/host_mib": "peak memory, MiB",
}
HEALTH = {
    "throughput/rows_per_second": "rows a second",
    "throughput/tokens_per_second": "tokens a second",
    "throughput/padding": "share of padding",
    "throughput/seconds_per_step": "seconds a step",
    "memory/host_mib": "peak memory, MiB",
    "memory/gpu_mib": "peak memory of the GPU, MiB",
    "stage/seconds": "seconds",
}
TABLES = ("samples", "texts", "results", "settings", "data_report")
CHARTS = ("plots/learning", "plots/reliability")


def main() -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(_run)


def _run() -> None:
    if switched("PUBLISH"):
        put(_published(_entity()))
        return
    file = artifacts.runs_root() / "reports" / "wandb_workspace.json"
    told = json.dumps(spec(workspace(_asked_entity() or "entity")), indent=1)
    write_whole(file, told)
    put(short(file))
    say("nothing was sent: make dashboard PUBLISH=1 does that, with a W&B account")


def workspace(entity: str) -> Any:
    """The workspace: cold and warm rows, crossover, cost against quality, curves, health, samples.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            "the dashboard needs wandb-workspaces: .venv/bin/python -m pip install -c constraints.txt -e "
            '".[dashboard]"'
        ) from error
    from lightning_modules.fusion.model import bin_names

    def bars(title: str, metric: str) -> Any:
        """A bar for each method, the mean of its runs."""
        method = wr.Config("method")
        return wr.BarPlot(
            title=title, metrics=[metric], orientation="h", groupby=method, groupby_aggfunc="mean"
        )

    quality = [(g, m) for m in QUALITY for g in GROUPS]
    sections = {
        "Cold and warm": [
            bars(f"{g.replace('_', ' ')}: {m}", f"test/{g}/{m}") for g, m in quality
        ],
        "CF against language models, by the target's training events": [
            bars(f"hit@1 at {name} training events", f"crossover/{name}/hit@1") for name in bin_names()
        ],
        "Cost against quality": [
            wr.ScatterPlot(
                title=f"{m} against {name}", x=wr.SummaryMetric(cost), y=wr.SummaryMetric(f"test/all/{m}"),
                log_x=True,
            )
            for m in QUALITY for cost, name in COSTS.items()
        ],
        "Curves": [wr.LinePlot(title=c, x="trainer/global_step", y=[c]) for c in CURVES],
        "Health of each stage": [bars(name, metric) for metric, name in HEALTH.items()],
        "Prompts, answers and charts": [
            *(wr.WeavePanelSummaryTable(table_name=name) for name in TABLES),
            wr.MediaBrowser(title="charts", media_keys=list(CHARTS)),
        ],
    }  # fmt: skip
    return ws.Workspace(
        name=NAME,
        entity=entity,
        project=os.environ.get("WANDB_PROJECT", "").strip() or "llmrec",
        sections=[
            ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()
        ],
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step"),
    )


def spec(made: Any) -> dict[str, Any]:
    """What W&B is sent, with numbers in place of the panels' random ids."""
    # The package has no public way to a workspace's content without a server.
    told: dict[str, Any] = json.loads(
        made._to_model().model_dump_json(by_alias=True, exclude_none=True)
    )
    for number, panel in enumerate(panels_of(told)):
        panel["__id__"] = f"panel{number}"
    return told


def panels_of(told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels of all sections."""
    for section in told["spec"]["section"]["panelBankConfig"]["sections"]:
        yield from section["panels"]


def metrics_of(told: dict[str, Any]) -> set[str]:
    """Every name of a metric, a table or a chart that a panel shows."""
    found: set[str] = set()
    for panel in panels_of(told):
        held = panel["config"]
        found |= {*held.get("metrics", ()), *held.get("mediaKeys", ())}
        found |= {str(held[k]).removeprefix("summary:") for k in ("xAxis", "yAxis") if k in held}
        if expression := held.get("panel2Config"):
            found.add(expression["exp"]["fromOp"]["inputs"]["key"]["val"])
    return found


def _asked_entity() -> str:
    return os.environ.get("WANDB_ENTITY", "").strip()


def _entity() -> str:
    """Whose workspace it will be.

    Raises:
        UserError: there is no account.
    """
    import wandb

    try:
        known = wandb.login(prompt=False)
    except Exception as error:  # of the network or of the key
        raise _unreachable(error) from error
    if not known:
        raise UserError(
            "PUBLISH=1 needs a W&B account: set WANDB_API_KEY, or run .venv/bin/wandb login; without one "
            "make report NAME=... shows the same panels"
        )
    try:
        found: Sequence[str | None] = (_asked_entity(), wandb.Api().default_entity)
    except Exception as error:  # of the network or of the key
        raise _unreachable(error) from error
    return next((name for name in found if name), "") or ""


def _published(entity: str) -> str:
    """The address of the workspace that was sent."""
    made = workspace(entity)
    try:
        made.save()
    except Exception as error:  # of the network or of the key
        raise _unreachable(error) from error
    return str(made.url)


def _unreachable(error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"W&B did not take the workspace ({reason}): look at the network and the key")


if __name__ == "__main__":
    sys.exit(main())
