"""``make report`` and ``make dashboard`` on real tiny runs: a browser, W&B's names, and keys."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded
from tests.lightning_modules.tiny_llm import tallrec_words, write_tiny_llm
from tests.recipes.conftest import EXPERIMENT, chromium

TALLREC = "tallrec/movie_64shot"
EVIL = '<script>document.title="stolen"</script><img src="https://example.org/x.png">'
KEYS = {"WANDB_API_KEY": "w" * 40, "HF_TOKEN": "hf_" + "t" * 34}
# Logged where there is a GPU, by predict stages, and by methods whose validation ranks nothing.
ELSEWHERE = {"memory/gpu_mib", "texts", "val/loss"}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny: list[str], tiny_movielens: Path,
    run_command: Callable[..., Any],
) -> Path:  # fmt: skip
    """SASRec, and TALLRec on a tiny language model, with W&B offline and keys in the environment."""
    runs = tmp_path_factory.mktemp("runs")
    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=1024)
    words = [
        *tallrec_words(llm, tiny_movielens, examples=8), "launch.accelerator=cpu",
        "++stages.train.trainer.max_epochs=2", "++stages.train.trainer.limit_val_batches=1.0",
        "++llm.dtype=float32", "~stages.reference",
    ]  # fmt: skip
    for name, given in ((EXPERIMENT, [*tiny, "logger.wandb.log_scores=true"]), (TALLREC, words)):
        done = run_command("exp", name, "logger=wandb", *given, runs=runs, **KEYS)
        assert done.returncode == 0, done.stderr[-4000:]
        assert not any(key in done.stdout + done.stderr for key in KEYS.values())
    return runs


@pytest.fixture(scope="module")
def page(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, tiny: list[str],
    command_environment: Callable[[Path], dict[str, str]],
) -> Path:  # fmt: skip
    """The page of SASRec, one of whose titles is an attack."""
    copy = tmp_path_factory.mktemp("copy") / "runs"
    shutil.copytree(runs, copy, symlinks=True)
    (samples,) = copy.glob("sasrec.evaluate-*/samples.evaluate.json")
    records = json.loads(samples.read_text())
    records[0]["history"], records[0]["prompt"] = [EVIL], EVIL
    records[0]["items"][0] |= {"title": EVIL, "picture": "https://example.org/y.png"}
    samples.write_text(json.dumps(records))
    done = ask(command_environment(copy), "page", EXPERIMENT, *tiny)
    assert done.returncode == 0, done.stderr
    file = copy / "reports" / "sasrec.movielens_100k" / "index.html"
    assert Path(done.stdout.strip()).resolve() == file.resolve()
    assert [f.name for f in file.parent.iterdir()] == ["index.html"]
    return file


def ask(environment: dict[str, str], module: str, *words: str, **more: str) -> Any:
    """``make report`` or ``make dashboard``, as the Makefile starts them."""
    return preloaded.run(f"experiments.{module}", *words, env={**environment, **more})


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    """Chromium on the page."""
    with chromium(page.as_uri()) as found:
        yield found


@pytest.mark.slow
def test_a_browser_shows_the_page_and_asks_for_nothing_else(browser: Any, page: Path) -> None:
    asked = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    addresses = [
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    ]
    assert {a for a in addresses if not a.startswith("data:")} == {page.as_uri()}
    assert browser.get_log("browser") == []
    assert browser.title == EXPERIMENT
    heads = browser.execute_script(
        "return [...document.querySelectorAll('h2')].map(h => h.innerText)"
    )
    assert [h.partition(":")[0] for h in heads] == [
        "Results", "Learning curves", "Stages", "Prompts, answers and scores", "Data",
        "Settings, and where each came from",
    ]  # fmt: skip
    assert len(browser.find_elements("css selector", ".chart svg")) == 4


@pytest.mark.slow
def test_the_tables_cells_are_those_of_the_results(browser: Any, runs: Path) -> None:
    lines = browser.execute_script(
        "return [...document.querySelector('#results-1 table').rows].map("
        "r => [...r.cells].map(c => c.innerText))"
    )
    heads, group, found = lines[0], "", {}
    for cells in lines[1:]:
        if len(cells) == 1:
            group = cells[0].replace(" ", "_")
        else:
            name = cells[0].removesuffix(" *")
            found |= {(name, group, h): c for h, c in zip(heads, cells, strict=True)}
    expected = {}
    for file in runs.glob("*/metrics.json"):
        job = json.loads(file.with_name("stage.json").read_text())
        for row, values in json.loads(file.read_text())["rows"].items():
            if job["experiment"] == EXPERIMENT:
                told = EXPERIMENT if row == "evaluate" else row
                expected |= {(told, *n.split("/")): told_as(row, n, values) for n in values}
    compared = {key: text for key, text in found.items() if key[2] not in ("method", "seeds")}
    assert len(compared) > 150
    assert compared == {key: expected[key] for key in compared}


def told_as(row: str, name: str, values: dict[str, dict[str, Any]]) -> str:
    """A value with its interval, by hand."""
    value, error = values[name]["value"], values[name]["stderr"]
    if value is None:
        return "-"
    if name.endswith("/n"):
        return f"{value:.0f}"
    if error is None or row == "random":
        return f"{value:.4f}"
    if error:
        return f"{value:.4f} ±{1.96 * error:.4f}"
    others = 1.96**2 / (values[f"{name.partition('/')[0]}/n"]["value"] + 1.96**2)
    return f"{value:.4f} [{value * (1 - others):.4f}, {value + others * (1 - value):.4f}]"


@pytest.mark.slow
def test_what_titles_and_prompts_hold_stays_text(browser: Any, page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "https://example.org" not in html.replace("src=&quot;https://example.org/x.png", "")
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    cards = browser.find_elements("css selector", ".card")
    (card,) = [c for c in cards if "script" in c.text]
    assert card.text.count(EVIL) == 3
    assert card.find_elements("css selector", "img") == []
    assert browser.title == EXPERIMENT


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(browser: Any) -> None:
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        wide = "return document.documentElement.scrollWidth"
        assert browser.execute_script(wide) <= 390
        cut = "return [...document.querySelectorAll('.chart')].filter(c => c.scrollWidth > c.clientWidth)"
        assert browser.execute_script(cut) == []
        hint = "return getComputedStyle(document.querySelector('.scroll'), '::before').content"
        assert "more columns to the right" in browser.execute_script(hint)
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        red = int(ground.removeprefix("rgb(").partition(",")[0])
        assert (red > 200) == (scheme == "light")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_settings_say_where_they_came_from(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    line = "<td><code>module.hidden_size</code></td><td><code>16</code></td><td>command line: "
    assert f"{line}++stages.train.module.hidden_size=16</td>" in html
    assert (
        "<td><code>launch.num_workers</code></td><td><code>0</code></td><td>experiments/base.yaml"
        in html
    )


@pytest.mark.slow
def test_every_metric_of_the_dashboard_is_logged_by_a_real_run(
    runs: Path, command_environment: Callable[[Path], dict[str, str]]
) -> None:
    pytest.importorskip("wandb_workspaces")
    from experiments import dashboard
    from lightning_modules.fusion.model import bin_names

    logged: set[str] = set()
    for run in runs.glob("*/wandb/offline-run-*"):
        wandb = str(Path(sys.executable).with_name("wandb"))
        told = subprocess.run(
            [wandb, "leet", "inspect", "--summary", "--json", str(run)],
            capture_output=True, text=True, check=True, env=command_environment(runs),
        )  # fmt: skip
        logged |= json.loads(told.stdout)["summary"].keys()
    assert {"throughput/rows_per_second", "throughput/tokens_per_second", "val/all/auc"} <= logged
    bins = {f"crossover/{name}/hit@1" for name in bin_names()}
    assert bins & logged  # those that the tiny data have
    done = ask(command_environment(runs), "dashboard")
    assert done.returncode == 0, done.stderr
    told = json.loads((runs / "reports" / "wandb_workspace.json").read_text())
    assert dashboard.metrics_of(told) - logged - bins - ELSEWHERE == set()
    again = ask(command_environment(runs), "dashboard")
    assert again.returncode == 0
    assert json.loads((runs / "reports" / "wandb_workspace.json").read_text()) == told


@pytest.mark.slow
def test_keys_of_accounts_stand_in_no_written_file(runs: Path) -> None:
    written = [f for f in runs.rglob("*") if f.is_file()]
    assert (
        sum(f.suffix == ".wandb" for f in written) >= 7
    )  # two stages, four plain rows, TALLRec's two
    for file in written:
        content = file.read_bytes()
        assert not any(key.encode() in content for key in KEYS.values()), file


@pytest.mark.slow
def test_asked_scores_are_an_artifact(runs: Path) -> None:
    (run,) = runs.glob("sasrec.evaluate-*/wandb/offline-run-*/*.wandb")
    assert b"scores-" in run.read_bytes()
    for run in runs.glob("tallrec.evaluate-*/wandb/offline-run-*/*.wandb"):
        assert b"scores-" not in run.read_bytes()


def test_publishing_without_an_account_is_refused(
    tmp_path: Path, command_environment: Callable[[Path], dict[str, str]]
) -> None:
    environment = {**command_environment(tmp_path), "HOME": str(tmp_path), "PUBLISH": "1"}
    environment.pop("WANDB_API_KEY", None)
    done = ask(environment, "dashboard", WANDB_MODE="online", NETRC=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "PUBLISH=1 needs a W&B account" in done.stderr


def test_a_key_among_the_overrides_is_refused(
    run_command: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    secret = f"+logger.wandb.settings.api_key={'s' * 40}"
    done = run_command("exp", EXPERIMENT, *tiny, "logger=wandb", secret, runs=tmp_path)
    assert done.returncode == 2
    assert "looks like a key" in done.stderr
    assert not any(b"s" * 40 in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


def test_an_experiment_that_was_not_run_is_refused(
    tmp_path: Path, command_environment: Callable[[Path], dict[str, str]]
) -> None:
    done = ask(command_environment(tmp_path), "page", EXPERIMENT)
    assert done.returncode == 2
    assert f"make exp NAME={EXPERIMENT}" in done.stderr
    assert list(tmp_path.iterdir()) == []
