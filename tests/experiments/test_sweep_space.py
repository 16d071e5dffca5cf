"""Space files: what they may say, what is refused, and that every shipped one fits its experiment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments import config, sweep_space, sweep_trial
from experiments.errors import UserError

SHIPPED = sorted(sweep_space.SPACES.glob("*.yaml"))
RATE = {"low": 1e-4, "high": 1e-2, "log": True}


def space(parameters: dict[str, Any], **settings: Any) -> sweep_space.Space:
    told = {"sampler": "tpe", "metric": "ndcg@10", "parameters": parameters, **settings}
    return sweep_space.parse(told, "x.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_space_fits_the_experiment_that_its_header_names(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = re.search(r"^# Run: +make sweep NAME=(\S+) SPACE=(\S+)", text, re.M)
    assert found, "the header says `# Run:    make sweep NAME=... SPACE=experiments/sweeps/...`"
    assert found[2] == f"experiments/sweeps/{path.name}"
    made = sweep_space.parse(sweep_space.read(path), path.name)
    experiment = config.load(found[1])
    aim = sweep_trial.target(made, experiment)
    for axis in made.axes:
        for value in axis.ends():
            changed = config.load(found[1], [f"{axis.key}={value}"])
            assert changed.config != experiment.config or value in text, f"{axis.key} sets nothing"
            assert aim.stage in changed.stages


def test_no_space_is_taken_for_an_experiment() -> None:
    assert len(SHIPPED) >= 2
    assert not [name for name in config.names() if name.startswith("sweeps/")]


@pytest.mark.parametrize(
    "value",
    ["a b", "it's", "$HOME; rm -rf /", "a,b", "1", "true", "null", "`id`", "choice(1,2)", "é", "", 1e-05, 3,
     True, None, [1, "a b"], {"_target_": "x.Y", "k": [1.5]}],
)  # fmt: skip
def test_a_value_is_read_as_it_was_meant(value: Any) -> None:
    override = OverridesParser.create().parse_override(f"key={sweep_space.text_of(value)}")
    assert not override.is_sweep_override()
    assert override.value() == value
    assert type(override.value()) is type(value)


def test_numbers_are_written_without_the_dust_of_binary_fractions() -> None:
    dropout = space({"d": {"low": 0.0, "high": 0.6, "step": 0.1}}).axes[0]
    assert dropout.grid() == ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6")
    assert space({"n": {"low": 20, "high": 60, "step": 20}}).axes[0].grid() == ("20", "40", "60")
    rate = space({"r": RATE}).axes
    assert sweep_space.override_words({"r": 0.00318208772723}, rate) == ["r=0.00318209"]


def test_a_grid_goes_through_all_combinations_the_last_axis_fastest() -> None:
    made = space({"a": ["x", "y"], "b": {"low": 1, "high": 2, "step": 1}}, sampler="grid")
    assert [tuple(p.values()) for p in made.points()] == [
        ("x", "1"), ("x", "2"), ("y", "1"), ("y", "2")
    ]  # fmt: skip


def test_a_label_has_as_many_words_as_it_takes() -> None:
    made = space({"stages.a.module.dropout": [1], "stages.b.module.dropout": [1], "seed": [0, 1]})
    assert list(made.labels().values()) == ["a.module.dropout", "b.module.dropout", "seed"]


@pytest.mark.parametrize(
    ("parameters", "settings", "said"),
    [
        ({"r": {"low": 1, "high": 1}}, {}, "r: low: 1 is not below high: 1"),
        ({"r": {"low": 2.0, "high": 1.0}}, {}, "low: 2.0 is not below"),
        ({"r": []}, {}, "r is an empty list"),
        ({"r": ["a", "a"]}, {}, "r lists a value twice"),
        ({"r": 3}, {}, "r is 3, expected a list of values"),
        ({"r": {"low": 0.0, "high": 1.0, "log": True}}, {}, "has no logarithm"),
        ({"r": {"low": 1.0, "high": 2.0, "log": True, "step": 0.5}}, {}, "exclude each other"),
        ({"r": {"low": 0, "high": 10, "step": 3}}, {}, "does not lead from 0 to 10"),
        ({"r": {"low": "1e-4", "high": 1}}, {}, "low is '1e-4', expected a number"),
        ({"r": {"low": 1, "hihg": 2}}, {}, "unknown key 'hihg'"),
        ({"r": RATE}, {"sampler": "grid"}, "a grid needs a list of values, or a step"),
        ({"r": RATE}, {"sampler": "random"}, "sampler is 'random', expected one of tpe, grid"),
        ({"r": RATE}, {"on": "test"}, "a search that chooses by the test set"),
        ({"r": [1]}, {"on": "test", "sampler": "grid", "pruner": "median"}, "leave it out"),
        ({"r": RATE}, {"metric": None}, "metric is missing"),
        ({"r": RATE}, {"seed": -1}, "seed is -1"),
        ({"r": RATE}, {"smapler": "tpe"}, "unknown key 'smapler'; did you mean 'sampler'?"),
        ({"launch.threads": [1, 2]}, {}, "launch.threads changes no result"),
        ({}, {}, "parameters is missing or empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    parameters: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as told:
        space(parameters, **settings)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)a is an empty list.*b is 3"):
        space({"a": [], "b": 3})


def test_files_that_are_none(tmp_path: Path) -> None:
    for text, said in (("a: [1", "not readable YAML, line"), ("- 1\n", "holds no mapping")):
        file = tmp_path / "x.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            sweep_space.read(file)
    with pytest.raises(UserError, match="did you mean 'sasrec_movielens_100k'"):
        sweep_space.find("experiments/sweeps/sasrec_movielens_10k.yaml")
    with pytest.raises(UserError, match="SPACE is missing"):
        sweep_space.find("")
    assert (
        sweep_space.find("sasrec_movielens_100k")
        == sweep_space.SPACES / "sasrec_movielens_100k.yaml"
    )


def test_on_is_a_key_although_yaml_takes_it_for_yes(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("sampler: grid\nmetric: auc\non: test\nparameters: {a: [1e-3, text]}\n")
    made = sweep_space.parse(sweep_space.read(file), file.name)
    assert made.on == "test"
    assert made.axes[0].grid() == ("0.001", "text")
