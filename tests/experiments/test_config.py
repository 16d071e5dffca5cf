"""Every shipped configuration composes and binds; every mistake in one is named, with what was meant."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import artifacts, build, check, config
from experiments.errors import UserError

ROOT = config.ROOT
NAMES = config.names()
BASIC = "sasrec/movielens_100k"
GROUP_FILES = [
    (group, file.stem) for group in config.GROUPS for file in sorted((ROOT / group).glob("*.yaml"))
]
SREC = "mllm_srec/toy_shop"
# Arguments that say how a model is trained, not what it is.
OF_TRAINING = {
    "loss", "learning_rate", "warmup_steps", "positions", "matching", "item_reconstruction",
    "text_reconstruction", "recommendation", "max_users", "betas", "schedule",
}  # fmt: skip


def refused(*overrides: str, name: str = BASIC) -> str:
    """The message of an experiment that must not load or bind."""
    with pytest.raises(UserError) as caught:
        check.require_sound(config.composed(name, overrides))
    return str(caught.value)


# ---------------------------------------------------------------- what we ship


def test_there_is_something_to_test() -> None:
    assert BASIC in NAMES
    assert ("data", "movielens_1m") in GROUP_FILES
    assert not [n for n in NAMES if n.startswith(("data/", "trainer/", "logger/", "base"))]


def _trained(stage: dict[str, Any]) -> dict[str, Any]:
    """How a stage of TALLRec is trained, whatever items are called."""
    module = {k: v for k, v in stage["module"].items() if k != "prompt"}
    return {"module": module, "batch_size": stage["batch_size"], "trainer": stage["trainer"]}


@pytest.mark.parametrize("name", ["movie_to_book", "book_to_movie", "both"])
def test_across_domains_tallrec_has_the_recipe_of_its_64_shots(name: str) -> None:
    own, across = (
        config.load(f"tallrec/{n}").config for n in ("movie_64shot", f"cross_domain_{name}")
    )
    assert _trained(across["stages"]["train"]) == _trained(own["stages"]["train"])
    assert across["stages"]["evaluate"]["batch_size"] == own["stages"]["evaluate"]["batch_size"]
    drawn = [
        {k: v for k, v in data["examples"].items() if k != "base"}
        for data in (own["data"], *across["data"]["parts"].values())
    ]
    assert drawn == [drawn[0]] * 3
    words = across["stages"]["train"]["module"]["prompt"].values()
    assert all(w["counts"] == own["stages"]["train"]["module"]["prompt"]["counts"] for w in words)


def test_tallrecs_curve_goes_through_its_64_shots() -> None:
    """That stage is the very run; the others differ by the number of examples, few ones also by steps."""
    own, curve = (config.load(f"tallrec/{n}").config for n in ("movie_64shot", "movie_k_curve"))
    assert curve["data"] == own["data"]
    assert curve["stages"]["train"] == own["stages"]["train"]
    assert curve["stages"]["evaluate"] == own["stages"]["evaluate"]
    for count in (1, 2, 4, 8, 16, 32, 128, 256, 512):
        stage = curve["stages"][f"train_{count}"]
        assert stage["data"]["examples"]["count"] == count
        assert stage["data"]["examples"]["behind"] == own["data"]["examples"]["behind"] == 5
        found, expected = _trained(stage), _trained(own["stages"]["train"])
        if count < 16:
            found["trainer"], steps = {**expected["trainer"]}, found["trainer"]["max_steps"]
            assert steps == 2 * 16 * (1 + 5) // stage["batch_size"]
        assert found == expected


@pytest.mark.parametrize(
    ("name", "place"),
    [*((n, "data") for n in NAMES if re.search("[0-9]shot", n) and not n.endswith("_paper")),
     ("tallrec/cross_domain_both", "data.parts.movie")],
)  # fmt: skip
def test_few_shots_have_no_more_labels_to_choose_an_epoch_by(name: str, place: str) -> None:
    """Of any size: those that no file has are asked for by ``data.examples.count``."""
    found: Any = config.load(name, [f"{place}.examples.count=5"]).config
    for key in place.split("."):
        found = found[key]
    assert found["examples"]["count"] == found["examples"]["valid"] == 5
    assert found["expected"]["valid_examples"] == 5


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_composes_and_binds_to_real_signatures(name: str) -> None:
    assert list(check.binding_problems(config.load(name))) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_what_it_is_and_how_to_run_it(name: str) -> None:
    text = (ROOT / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(config.header(name)) > 20
    assert text.startswith("# @package _global_\n")
    assert f"make exp NAME={name}\n" in text, "the command in the header must be this file's"
    assert "# Needs:" in text


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([], None),
        (["seed=1", "data.root=/mine", "data.mask_seen=false"], None),  # of the same data
        (["data=movielens_100k"], None),  # what the file takes by itself
        (["data=movielens_1m"], "MovieLens-1M (data=movielens_1m)"),
        (["data=custom", "data.interactions=/x.csv", "data.name=mine"],
         "mine (data=custom)"),
        (["data.name=mine"], "mine"),
        (["data=custom", "data.interactions=/x.csv"], "Data of your own (data=custom)"),
        (["data.release=1m"], "data.release=1m"),
    ],
)  # fmt: skip
def test_a_caption_names_the_data_that_was_taken(overrides: list[str], where: str | None) -> None:
    found = config.caption(BASIC, overrides)
    if where is None:
        assert found == config.header(BASIC)
    else:
        assert found == f"its method and settings on {where}, not on the data of its file"
        assert "MovieLens-100K" not in found


ADDED = ("llm", "engine", "backbone")


@pytest.mark.parametrize(("group", "option"), GROUP_FILES)
def test_a_group_file_composes_as_an_override_and_binds(group: str, option: str) -> None:
    file = ROOT / group / f"{option}.yaml"
    # No llm, engine or backbone is swapped here, but added, which Hydra does from the root only.
    name, plus = ("data/movielens_100k", "+") if group in ADDED else (BASIC, "")
    name = SREC if group.startswith("srec_") or group == "worked" else name
    experiment = config.load(name, [f"{plus}{group}={option}"])
    assert list(check.binding_problems(experiment)) == []
    assert file.read_text(encoding="utf-8").startswith("#"), "its first line says what it is"


def test_a_fit_that_never_validates_is_told_before_it_starts() -> None:
    every = "++stages.train.trainer.check_val_every_n_epoch=3"
    short = config.load(BASIC, [every, "++stages.train.trainer.max_epochs=2"])
    (problem,) = check.binding_problems(short)
    assert "ends after 2 epochs, before its first validation in epoch 3" in problem
    for words in (
        [every, "++stages.train.trainer.max_epochs=3"],
        [every, "++stages.train.trainer.max_epochs=2", "stages.train.select=null"],
    ):
        assert list(check.binding_problems(config.load(BASIC, words))) == []


def test_cells_of_ablations_share_the_stages_that_their_axes_do_not_touch() -> None:
    grid = yaml.safe_load((ROOT / "sweeps" / "mllm_srec_grid.yaml").read_text())["parameters"]
    assert [len(choices) for choices in grid.values()] == [3, 4, 3, 2, 1]
    axes = ("srec_input", "srec_steps")
    cells = [
        config.load(SREC, [f"{axis}={choice}" for axis, choice in zip(axes, cell, strict=True)])
        for cell in itertools.product(*(grid[axis] for axis in axes))
    ]
    for axis in ("srec_tuning", "srec_reasoning"):
        rest = set(grid[axis]) - {"lora", "staged"}  # what the file itself has
        cells += [config.load(SREC, [f"{axis}={choice}"]) for choice in sorted(rest)]
    told: dict[str, set[str]] = {}
    for cell in cells:
        for name, stage in cell.stages.items():
            told.setdefault(name, set()).add(json.dumps(stage, sort_keys=True))
    counts = {name: len(words) for name, words in told.items()}
    once = ("align_vision", "item_pictures", "item_attributes", "user_summaries")
    assert {name: counts[name] for name in once} == dict.fromkeys(once, 1)
    assert counts["item_fusion"] == 3  # of words, of pictures, of both
    # Without pictures VIU has nothing to ask about: the same as the base. Then QLoRA, then no chain.
    assert counts["sft"] == (3 * 4 - 1) + 1 + 1


def test_each_axis_is_one_override() -> None:
    usual = config.load(SREC).stages
    assert {"item_attributes", "item_fusion", "user_summaries", "sft", "evaluate"} <= set(usual)
    none = config.load(SREC, ["srec_tuning=zero_shot"]).stages
    assert "sft" not in none
    assert "weights" not in none["evaluate"]["inputs"]
    assert none["evaluate"]["module"]["adapter"]["method"] == "none"
    assert none["user_summaries"] == usual["user_summaries"]
    four = config.load(SREC, ["srec_tuning=qlora"]).stages
    assert four["sft"]["module"]["quantization"] == "nf4-dq"
    assert four["item_fusion"] == usual["item_fusion"]
    text = config.load(SREC, ["srec_input=text"]).stages
    assert not {"align_vision", "item_attributes", "evaluate_swapped"} & set(text)
    assert text["sft"]["module"]["pictures"] == "none"
    assert "llm.projector" not in text["sft"]["inputs"]
    base = config.load(SREC, ["srec_steps=base"]).stages
    assert not {"item_attributes", "item_fusion", "user_summaries"} & set(base)
    assert base["sft"]["module"]["history"] == ["title", "picture"]
    swapped = config.load(SREC, ["llm=qwen2.5_vl_3b"]).stages
    assert "align_vision" not in swapped
    assert config.load("mllm_srec/toys").stages["sft"]["module"]["quantization"] == "nf4-dq"


def test_the_toy_shops_experiments_share_what_reads_pictures() -> None:
    """Aligning takes minutes, and what is made up is to be counted of the model that recommends."""
    usual = config.load("mllm_msr/toy_shop").stages
    for name in ("mllm_msr/toy_shop_hallucinations", "mllm_msr/toy_shop_probes", SREC):
        other = config.load(name).stages
        assert other["align_vision"] == usual["align_vision"], name
        assert other.get("item_pictures", usual["item_pictures"]) == usual["item_pictures"], name


@pytest.mark.parametrize("step", ["base", "viu", "imsg", "full"])
def test_the_engine_runs_every_stage_that_writes(step: str) -> None:
    written = {"base": 1, "viu": 1, "imsg": 2, "full": 3}[step]
    for name, read in (
        ("mllm_srec/baby", "text"),
        ("mllm_srec/toys", "image"),
        ("mllm_srec/sports", "both"),
    ):
        asked = [f"srec_input={read}", f"srec_steps={step}", "engine=vllm"]
        stages = config.load(name, asked).stages.values()
        engines = [
            s["module"].get("engine", {}).get("_target_") for s in stages if s["run"] == "predict"
        ]
        texts = read == "text" and step in ("base", "viu")  # nothing to write about
        count = 0 if texts else written - (read == "text")
        assert engines == ["lightning_modules.llm.engines.VLLMEngine"] * count


@pytest.mark.parametrize("option", [o for group, o in GROUP_FILES if group == "data"])
def test_a_data_file_replaces_the_data_and_is_an_experiment_of_its_own(option: str) -> None:
    swapped = config.load(BASIC, [f"data={option}"]).config["data"]
    alone = config.load(f"data/{option}")
    assert swapped == alone.config["data"]
    assert list(alone.stages) == ["reference"]
    assert list(check.binding_problems(alone)) == []
    assert (swapped == config.load(BASIC).config["data"]) == (option == "movielens_100k")
    assert config.full_name(option) == alone.name


def test_no_two_data_files_ask_for_the_same() -> None:
    options = [o for group, o in GROUP_FILES if group == "data"]
    asked = [json.dumps(config.load(f"data/{o}").config["data"], sort_keys=True) for o in options]
    assert len(set(asked)) == len(options)


def test_every_stage_that_reads_weights_has_the_module_that_wrote_them() -> None:
    for name in NAMES:
        stages = config.load(name).stages
        for stage in stages.values():
            if source := (stage.get("inputs") or {}).get("weights"):
                reader, writer = stage["module"], stages[source.partition("/")[0]]["module"]
                if writer.keys() <= reader.keys():
                    shown = ("pictures", "texts")  # of candidates: what a probe shows instead
                    read, wrote = (
                        {k: v for k, v in node.items() if k not in shown}
                        for node in (reader, writer)
                    )
                    assert read == wrote
                    continue
                # A probe leaves out how the model was trained, and differs in what it asks or how exactly.
                asked = {"probe", "pictures", "llm", "joint", "match", "shortlist_items"}
                same = reader.keys() - asked
                if "match" in reader:  # the same module, which writes
                    assert reader["_target_"] == writer["_target_"].replace(
                        "Stage2", "WrittenStage2"
                    )
                    same -= {"_target_"}
                usual = build.signature_of(build.locate(writer["_target_"]))
                told = {key: writer[key] if key in writer else usual[key].default for key in same}
                told = {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}
                assert {key: reader[key] for key in same} == told
                assert writer.keys() - reader.keys() <= OF_TRAINING
                exact = dict.fromkeys(("dtype", "quantization", "block_size", "rounding"))
                assert reader.get("llm", {}) | exact == writer.get("llm", {}) | exact


@pytest.mark.parametrize("name", ["tallrec/movie_64shot_probes", "tallrec/movie_64shot_precisions"])
def test_what_a_prompt_shows_is_set_once_for_all_tests_of_one_model(name: str) -> None:
    own = ["max_length=5", "creator=false", "years=true", "prompt.counts=false", "adapter.rank=4"]
    changed = [f"stages.train.module.{word}" for word in own]
    stages = config.load(name, [*changed, "llm=gemma3_270m", "llm.max_length=700"]).stages
    trained = stages["train"]["module"]
    assert (trained["max_length"], trained["creator"], trained["years"]) == (5, False, True)
    tested = {n: s["module"] for n, s in stages.items() if (s.get("inputs") or {}).get("weights")}
    assert len(tested) > 2
    for module in tested.values():
        for key in ("max_length", "creator", "years", "prompt", "adapter"):
            assert module[key] == trained[key]
        exact = dict.fromkeys(("dtype", "quantization", "block_size", "rounding"))
        assert module["llm"] | exact == trained["llm"] | exact
    if name.endswith("precisions"):
        asked = ("dtype", "quantization", "block_size")
        kept = {n: tuple(m["llm"].get(key, 64) for key in asked) for n, m in tested.items()}
        assert kept == {"evaluate": ("auto", None, 64), "nf4": ("auto", "nf4-dq", 64),
                        "nf4_blocks_of_32": ("auto", "nf4-dq", 32),
                        "nf4_rounded": ("auto", "nf4-dq", 32), "int8": ("auto", "int8", 64),
                        "bfloat16": ("bfloat16", None, 64)}  # fmt: skip


# ---------------------------------------------------------------- what users mistype


@pytest.mark.parametrize(
    ("name", "meant"),
    [("sasrec/movielens_100", "sasrec/movielens_100k"), ("movielens_100k", "movielens_100k"),
     ("sasrek/movielens_100k", "sasrec/movielens_100k"), ("data/movielens_100", "data/movielens_100k")],
)  # fmt: skip
def test_an_unknown_experiment_is_answered_with_the_nearest(name: str, meant: str) -> None:
    said = refused(name=name)
    assert repr(name) in said
    assert meant in said.partition("did you mean")[2]
    assert "make list" in said


def test_a_missing_name_says_what_to_type() -> None:
    assert "make exp NAME=" in refused(name="")


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("stages.train.module.droput=0.3", "stages.train.module.dropout"),
        ("dropout=0.3", "stages.train.module.dropout"),
        ("stages.trian.batch_size=3", "stages.train.batch_size"),
        ("sead=1", "seed"),
        ("launch.device=2", "launch.devices"),
        ("dat=movielens_1m", "data"),
        ("data=movielens_1", "movielens_1m"),
        ("logger=wandbb", "wandb"),
        ("trainer=defaults", "default"),
    ],
)
def test_an_unknown_key_or_group_is_answered_with_the_nearest(override: str, meant: str) -> None:
    said = refused(override)
    assert f"did you mean '{meant}'?" in said, said
    assert "\n" not in said


@pytest.mark.parametrize(
    "override", ["seed", "seed 3", "stages.train.module.dropout==[", "=3", "a=[1"]
)
def test_an_override_that_cannot_be_read_says_how_to_write_one(override: str) -> None:
    said = refused(override)
    assert override in said
    assert "key=value" in said, said


def test_all_problems_are_told_at_once() -> None:
    said = refused(
        "+stages.train.module.droput=0.1", "+stages.train.module.hidden=3",
        "stages.train.module.dropout=high", "stages.train.module.hidden_size=1.5",
        "++stages.train.module.loss=cee",
        "+stages.train.module.num_items=7", "+data.splitt=1",
    )  # fmt: skip
    for word in (
        "'droput'; did you mean 'dropout'?", "'hidden'", "stages.train.module.dropout is 'high'",
        "stages.train.module.hidden_size is 1.5", "stages.train.module.loss is 'cee'",
        "num_items comes from the data",
        "'splitt'; did you mean 'split'?",
    ):  # fmt: skip
        assert word in said, (word, said)


def test_all_problems_of_the_frame_are_told_at_once() -> None:
    said = refused(
        "+stages.train.batchsize=3", "+stages.train.trainer.max_epoch=3",
        "stages.evaluate.run=tset", "+extra=1",
        "stages.evaluate.inputs.weights=tarin/best.ckpt", "~stages.train.select.metric",
        "++stages.train.select.patience=3", "+stages.train.modules.a._target_=b",
    )  # fmt: skip
    for word in (
        "'batchsize'; did you mean 'batch_size'?", "'max_epoch'; did you mean 'max_epochs'?",
        "'tset'", "'extra'", "'tarin/best.ckpt'",
        "stages.train.select", "either `module` or `modules`",
    ):  # fmt: skip
        assert word in said, (word, said)


@pytest.mark.parametrize("source", ["train", "best.ckpt", "nowhere/best.ckpt", "null"])
def test_an_input_names_a_stage_and_its_file(source: str) -> None:
    said = refused(f"stages.evaluate.inputs.weights={source}")
    assert "stages.evaluate.inputs.weights" in said
    assert "train/best.ckpt" in said


@pytest.mark.parametrize("value", ["null", "3", "[]"])
def test_a_stage_that_is_no_mapping_is_a_problem_and_not_a_crash(value: str) -> None:
    assert "stages.reference" in refused(f"stages.reference={value}")


@pytest.mark.parametrize(
    "argument", ["devices=2", "accelerator=cpu", "callbacks=[]", "logger=false"]
)
def test_what_the_runner_sets_itself_is_refused_in_trainer(argument: str) -> None:
    name = argument.partition("=")[0]
    assert name in refused(f"+stages.train.trainer.{argument}")


def test_inputs_in_a_circle_are_the_users_problem(tmp_path: Path) -> None:
    experiment = config.load(
        BASIC, ["+stages.train.inputs.weights=evaluate/scores.evaluate.parquet"]
    )
    with pytest.raises(UserError, match="train, evaluate form a circle"):
        artifacts.plan(experiment, tmp_path)


def test_a_wrong_constructor_path_names_the_nearest() -> None:
    said = refused("stages.train.module._target_=lightning_modules.sasrec.SASRecModul")
    assert "did you mean 'SASRecModule'?" in said
    assert "cannot be imported" in refused("stages.train.module._target_=nowhere.Module")


# ---------------------------------------------------------------- where a value came from


def test_origins_name_the_file_or_the_command_line() -> None:
    overrides = ["seed=3", "data=movielens_1m", "stages.train.module.dropout=0.4",
                 "logger=wandb", "+callbacks.seen._target_=lightning.pytorch.Callback",
                 "data.candidates={_target_:datamodules.candidates.UniformCandidates,count:20}"]  # fmt: skip
    experiment = config.load(BASIC, overrides)
    found = config.origins(BASIC, overrides)

    def origin(key: str) -> str:
        assert key in dict(config.flatten(experiment.config)), key
        return config.origin_of(key, found)

    assert origin("launch.devices") == "experiments/base.yaml"
    assert origin("trainer.precision") == "experiments/trainer/default.yaml"
    assert origin("stages.reference.modules.markov._target_") == "experiments/base.yaml"
    assert origin("stages.train.module.windows") == f"experiments/{BASIC}.yaml"
    assert origin("stages.evaluate.module.windows") == f"experiments/{BASIC}.yaml"
    assert origin("data.release") == "experiments/data/movielens_1m.yaml"
    assert origin("logger.wandb.project") == "experiments/logger/wandb.yaml"
    assert origin("seed") == "command line: seed=3"
    assert origin("stages.train.module.dropout").startswith("command line: stages.train.module")
    assert origin("callbacks.seen._target_").startswith("command line: +callbacks")
    for leaf in ("_target_", "count"):
        assert origin(f"data.candidates.{leaf}").startswith("command line: data.candidates"), leaf


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_every_experiment_has_an_origin(name: str) -> None:
    experiment, found = config.load(name), config.origins(name)
    for key, _ in config.flatten(experiment.config):
        source = config.origin_of(key, found)
        assert Path(ROOT.parent / source).is_file(), (key, source)


def test_an_epoch_is_not_chosen_for_its_worst_calibration() -> None:
    worst = refused("stages.train.select.metric=val/all/log_loss")
    assert "of which less is better" in worst
    better = [
        "+stages.train.select={metric: val/all/log_loss, mode: min}",
        "stages.train.trainer.limit_val_batches=1.0",
    ]
    check.require_sound(config.composed("tallrec/movie_64shot", better))


def test_an_epoch_is_not_chosen_by_a_validation_that_never_comes() -> None:
    """TALLRec's films validate on nothing, since they choose nothing."""
    film, chosen = "tallrec/movie_64shot", "+stages.train.select.metric=val/all/auc"
    never = refused(chosen, name=film)
    assert "stages.train selects its best epoch by val/all/auc, but validates on nothing" in never
    assert "set stages.train.trainer.limit_val_batches=1.0, too" in never
    for fine in ([chosen, "stages.train.trainer.limit_val_batches=1.0"], []):
        check.require_sound(config.composed(film, fine))


@pytest.mark.parametrize(
    ("override", "words"),
    [("launch.strategy=foo", "auto, ddp, fsdp"), ("launch.strategy=fsdp_cpu_offload", "auto, ddp"),
     ("stages.evaluate.inputs.weights=train/bst.ckpt", "best.ckpt and last"),
     ("stages.evaluate.inputs.weights=reference/best.ckpt", "a test leaves scores.random.parquet and"),
     ("stages.train.trainer.max_epochs=0", "nothing would be trained")],
)  # fmt: skip
def test_what_would_end_late_is_refused_at_once(override: str, words: str) -> None:
    assert words in refused(override)


# ---------------------------------------------------------------- parts that say the same


OWN = [o for group, o in GROUP_FILES if group == "backbone" and not o.endswith("_paper")]


@pytest.mark.parametrize("option", OWN)
def test_a_backbone_is_the_stage_of_its_own_experiment(option: str) -> None:
    stages = config.load(f"{option}/movielens_100k").stages
    chain = config.load("a_llmrec/movielens_100k_alignment", [f"backbone={option}"]).stages
    assert chain["backbone"] == stages["train"]


def test_a_swapped_part_has_keys_of_its_own() -> None:
    name = "a_llmrec/movielens_100k_alignment"
    words = ["backbone=bert4rec", "backbone.trainer.check_val_every_n_epoch=1"]
    assert config.load(name, words).stages["backbone"]["trainer"]["check_val_every_n_epoch"] == 1
    words = ["backbone=bert4rec", "backbone.module.max_length=9", "backbone.module.negatives=2"]
    assert config.load(name, words).stages["backbone"]["module"]["negatives"] == 2


def test_what_another_key_names_is_set_there() -> None:
    with pytest.raises(UserError, match=r"did you mean .backbone\.trainer\.max_epochs"):
        config.load("a_llmrec/movielens_100k_alignment", ["stages.backbone.trainer.max_epochs=1"])
