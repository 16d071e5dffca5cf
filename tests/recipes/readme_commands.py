"""How each command of the README is executed: the table that ``test_readme`` holds it to.

``Elsewhere``: by a test of that name. ``Ran``: by ``test_readme`` itself, through the Makefile's own recipe.
``Composed``: it needs what is not here; its configuration is composed and bound to real signatures.
``Left``: neither, and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GPU, HUB, FILES = "needs a GPU", "needs a model hub", "needs files that may not be passed on"


@dataclass(frozen=True)
class Elsewhere:
    """``file::test`` below ``tests/``."""

    test: str


@dataclass(frozen=True)
class Ran:
    """Words behind ARGS, what of the command is another here, and what its output then says."""

    says: str
    tiny: bool = True  # whether SASRec's tiny overrides stand behind it
    words: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Composed:
    """Why it is not run."""

    why: str


@dataclass(frozen=True)
class Left:
    """Why it is not even composed."""

    why: str


Way = Elsewhere | Ran | Composed | Left
SASREC = "make exp NAME=sasrec/movielens_100k"
CHAIN = "recipes/test_a_llmrec_chain.py"
CUSTOM = "recipes/test_readme.py::test_a_table_of_ones_own_becomes_data"
WALK = "recipes/test_readme.py::test_the_method_of_the_walk_runs"
LOSSES = (
    "++stages.train.module.loss=sampled_ce ++stages.train.module.negatives=256 "
    "++stages.train.module.shared_negatives=true"
)
TALLREC, MSR, SREC = "make exp NAME=tallrec/", "make exp NAME=mllm_msr/", "make exp NAME=mllm_srec/"
LLM = "make exp NAME=a_llmrec/movielens_100k"
ALL_CATEGORIES = 'make prepare NAME=amazon_2023 ARGS="data.category=all data.reviews=full"'

BLOCKS: dict[str, Way] = {
    SASREC: Ran("sasrec/movielens_100k"),
    "make test": Left("it is what runs this"),
    f'{SASREC} ARGS="seed=1 stages.train.module.dropout=0.3"': Elsewhere(
        "recipes/test_sasrec_chain.py::test_a_hyper_parameter_reruns_training_and_evaluation_alone"
    ),
    f"{SASREC} SEEDS=5": Elsewhere(
        "recipes/test_seeds.py::test_two_seeds_then_nothing_to_do_then_another_baseline"
    ),
    f"{SASREC} SEEDS=5 BASELINE=gru4rec/movielens_100k": Elsewhere(
        "recipes/test_seeds.py::test_two_seeds_then_nothing_to_do_then_another_baseline"
    ),
    f'{SASREC} ARGS="data=movielens_latest_small"': Composed("a download"),
    f"{SASREC}_paper": Elsewhere(
        "recipes/test_sasrec_chain.py::test_the_papers_chain_runs_with_drawn_candidates"
    ),
    'make exp NAME=reference/movielens_1m_sasrec ARGS="data.root=~/ml-1m"': Composed(FILES),
    f'{SASREC} ARGS="data=movielens_1m data.root=~/ml-1m"': Composed(FILES),
    f'{SASREC} ARGS="logger=wandb"': Elsewhere(
        "recipes/test_sasrec_chain.py::test_wandb_offline_keeps_one_id"
    ),
    f'{SASREC} ARGS="logger=tensorboard"': Elsewhere(
        "recipes/test_sasrec_chain.py::test_tensorboard_files_and_a_falling_loss"
    ),
    f'{SASREC} ARGS="launch.devices=2 launch.strategy=ddp"': Elsewhere(
        "recipes/test_sasrec_chain.py::test_two_devices_and_micro_batches_change_nothing"
    ),
    'make data NAME=amazon_2018 ARGS="data.category=Video_Games data.root=~/amazon"': Composed(FILES),
    'make data NAME=movielens_100k ARGS="data.split={_target_:datamodules.splits.GlobalTemporal,'
    'valid:0.1,test:0.1}"': Elsewhere(
        "recipes/test_labelled_rows.py::test_a_data_config_reports_joined_domains"
    ),
    'make data NAME=amazon_2023 ARGS="data.category=Books data.filters='
    '[{_target_:datamodules.sample_ids.SampleUsers,count:50000}]"': Composed("a download of 20 GB"),
    "make exp NAME=data/tallrec_movie": Composed("the rows without a model of test_labelled_rows"),
    f"{ALL_CATEGORIES} JOBS=4": Elsewhere(
        "experiments/test_prepare.py::test_two_categories_are_prepared_and_a_missing_one_is_named"
    ),
    "sbatch --array=0-33 --cpus-per-task=2 --mem=24G --wrap "
    f"'{ALL_CATEGORIES}'": Left("a Slurm cluster, and a download of 200 GB"),
    f'{SASREC} ARGS="data=custom data.interactions=$PWD/events.csv data.items=$PWD/items.csv '
    'data.name=mine"': Elsewhere(CUSTOM),
    "make data NAME=mine": Elsewhere(CUSTOM),
    f'{SASREC} ARGS="data=mine"': Elsewhere(CUSTOM),
    f'{SASREC} ARGS="{LOSSES}"': Elsewhere("recipes/test_sasrec_chain.py::test_every_loss_trains"),
    f'{SASREC} ARGS="split=valid"': Elsewhere(
        "recipes/test_sasrec_chain.py::test_validation_rows_can_be_scored_instead"
    ),
    f'{SASREC} ARGS="launch.compile=true"': Composed("needs a C++ compiler, and a minute of it"),
    # Language models
    f"{TALLREC}movie_64shot": Elsewhere(
        "recipes/test_tallrec.py::test_the_chain_runs_and_its_auc_is_that_of_the_scores_file"
    ),
    f'{TALLREC}movie_64shot ARGS="llm=smollm2_135m_nf4"': Elsewhere(
        "recipes/test_tallrec.py::test_a_quantized_model_goes_through_the_same_chain"
    ),
    f"{TALLREC}movie_icl_cot": Elsewhere(
        "recipes/test_tallrec_in_context.py::test_reasons_are_kept_and_not_written_twice"
    ),
    f"{TALLREC}movie_k_curve": Composed("ten fits of the stage that test_tallrec runs"),
    f'{TALLREC}cross_domain_both ARGS="data.parts.book.root=FOLDER"': Composed(FILES),
    f"{TALLREC}movie_64shot_paper": Composed(GPU),
    f'{TALLREC}movie_64shot_two_stage ARGS="instructions=FILE"': Elsewhere(
        "recipes/test_instruction_stage.py::test_both_stages_run_and_the_second_starts_where_the_first_ended"
    ),
    f'{TALLREC}movie_64shot_alpaca_only ARGS="instructions=FILE"': Elsewhere(
        "recipes/test_instruction_stage.py::test_the_first_stage_alone_shares_its_folder"
    ),
    f'{TALLREC}movie_64shot ARGS="+stages.train.inputs.start=FOLDER"': Elsewhere(
        "recipes/test_instruction_stage.py::test_a_given_adapter_takes_the_first_stages_place"
    ),
    LLM: Elsewhere(f"{CHAIN}::test_the_whole_chain"),
    f'{LLM} ARGS="backbone=gru4rec"': Elsewhere(
        "recipes/test_a_llmrec.py::test_other_backbones_stand_in_its_place"
    ),
    f'{LLM} ARGS="data.test_rows=null stages.stage2.module.max_users=null"': Composed(
        "test_a_llmrec_chain with other counts"
    ),
    f"{LLM}_text_joint": Composed("test_a_llmrec_chain with another item vector"),
    f"{LLM}_mlp_llm": Elsewhere(f"{CHAIN}::test_rows_beside_it"),
    f"{LLM}_tallrec": Composed("the second stage of test_a_llmrec_chain with LoRA"),
    f"{LLM}_no_matching": Composed("the first stage of test_a_llmrec with a weight of 0"),
    f"{LLM}_llm_only_lettered": Composed("its scores are those of test_a_llmrec_lettered"),
    f"{LLM}_curve": Composed("four times the stages of test_a_llmrec_chain"),
    'make exp NAME=a_llmrec/luxury_beauty_small_texts ARGS="data.root=FOLDER"': Elsewhere(
        "recipes/test_item_summaries.py::test_what_is_read_of_a_catalogue_stands_in_one_table"
    ),
    "make exp NAME=a_llmrec/luxury_beauty": Composed(GPU),
    'make recommend NAME=a_llmrec/movielens_100k USER=7 REQUEST="something funny"': Elsewhere(
        f"{CHAIN}::test_a_request_is_answered_from_what_sasrec_retrieves"
    ),
    f"{LLM}_crossover": Elsewhere(f"{CHAIN}::test_the_crossover_with_the_language_model"),
    "make crossover NAME=a_llmrec/movielens_100k_crossover": Elsewhere(
        f"{CHAIN}::test_the_crossover_with_the_language_model"
    ),
    f"{MSR}toy_shop": Elsewhere(
        "recipes/test_mllm_msr_pictures.py::test_the_chain_runs_and_reads_the_pictures"
    ),
    f"{MSR}toy_shop_text": Composed("the stages of test_mllm_msr on the shop"),
    f"{MSR}toy_shop_probes": Composed("as microlens_probes, which test_mllm_msr_pictures runs"),
    f"{MSR}toy_shop_catalogue": Elsewhere(
        "recipes/test_catalogue.py::test_a_language_model_orders_what_another_method_retrieved"
    ),
    f'{MSR}movielens_posters ARGS="data.images=TAR"': Composed(FILES),
    f'{MSR}movielens_posters_probes ARGS="data.images=TAR"': Composed(FILES),
    'make preferences NAME=mllm_msr/movielens_posters ARGS="data.images=TAR"': Elsewhere(
        "recipes/test_mllm_msr_pictures.py::test_a_page_and_a_sheet_tell_what_was_written_and_answered"
    ),
    f"{MSR}toy_shop_hallucinations": Elsewhere(
        "recipes/test_hallucinations.py::test_wrong_inputs_make_other_texts"
    ),
    "make hallucinations NAME=mllm_msr/toy_shop_hallucinations": Elsewhere(
        "recipes/test_hallucinations.py::test_what_nothing_supports_is_counted_for_each_stage"
    ),
    f"{MSR}movielens_100k_text": Elsewhere(
        "recipes/test_mllm_msr.py::test_users_are_ranked_among_candidates_by_group"
    ),
    f"{MSR}baby": Composed(GPU),
    f"{SREC}toy_shop": Elsewhere(
        "recipes/test_mllm_srec.py::test_the_chain_runs_and_its_probes_change_what_they_are_about"
    ),
    f'{SREC}toy_shop ARGS="srec_probes=both"': Elsewhere(
        "recipes/test_mllm_srec.py::test_the_chain_runs_and_its_probes_change_what_they_are_about"
    ),
    f'{SREC}toy_shop ARGS="srec_input=image srec_steps=viu srec_tuning=zero_shot '
    'srec_reasoning=in_one"': Elsewhere(
        "recipes/test_mllm_srec.py::test_an_axis_runs_anew_what_it_touches_and_nothing_else"
    ),
    f"{SREC}baby": Composed(GPU),
    f'{TALLREC}movie_64shot ARGS="llm=llama3.1_8b_nf4 launch.devices=2 launch.strategy=ddp"': Composed(GPU),
    f'{TALLREC}movie_64shot ARGS="llm=llama3.1_8b launch.devices=4 launch.strategy=fsdp"': Composed(GPU),
    f'{TALLREC}movie_64shot ARGS="llm=llama_7b_nf4 '
    '+stages.train.module.optimizer=paged_adamw_8bit"': Composed(GPU),
    # Recommending
    'make recommend NAME=sasrec/movielens_100k USER=7 K=5 EXCLUDE="Speed (1994); 50"': Elsewhere(
        "recipes/test_recommend.py::test_a_list_of_what_the_user_does_not_have"
    ),
    'make recommend NAME=sasrec/movielens_100k HISTORY="Toy Story; the godfather; 172" '
    "FORMAT=json": Elsewhere(
        "recipes/test_recommend.py::test_titles_make_a_history_and_json_can_be_read"
    ),
    "make recommend NAME=item_text_similarity/movielens_100k USER=7 ITEMS=new.jsonl": Elsewhere(
        "recipes/test_tallrec.py::test_items_that_nobody_has_seen_are_scored_by_their_words"
    ),
    "make recommend NAME=tallrec/movie_64shot USER=7 RETRIEVER=sasrec/movielens_100k": Elsewhere(
        "recipes/test_tallrec.py::test_a_retriever_of_other_data_hands_candidates_over"
    ),
    # Clusters, sweeps, pages
    "make slurm NAME=sasrec/movielens_100k GPUS=2 NODES=2 TIME=12:00:00": Ran(
        "#SBATCH --nodes=2", tiny=False, variables={"DRY": "1"}
    ),
    'make slurm NAME=sasrec/movielens_100k SEEDS=5 ARGS="slurm=mysite"': Ran(
        "#SBATCH --array=0-4", tiny=False, variables={"DRY": "1", "ARGS": "slurm=default"}
    ),
    'make slurm NAME=sasrec/movielens_100k GPUS=0 TASKS=4 ARGS="slurm.partition=cpu '
    'launch.threads=8"': Ran("#SBATCH --partition=cpu", tiny=False, variables={"DRY": "1"}),
    "make slurm NAME=a_llmrec/movielens_100k GPUS=2 CHAIN=1 SEEDS=3": Ran(
        "# sbatch --dependency=afterok:", tiny=False, variables={"DRY": "1"}
    ),
    "make plan NAME=a_llmrec/movielens_100k COST=1 TIME=12:00:00 MEMORY=24": Elsewhere(
        "recipes/test_preflight.py::test_prompts_are_measured_in_tokens"
    ),
    "make sweep NAME=sasrec/movielens_100k SPACE=experiments/sweeps/sasrec_movielens_100k.yaml "
    "N=50 JOBS=4": Elsewhere(
        "recipes/test_sweep.py::test_a_search_that_is_killed_goes_on_and_the_best_is_what_the_command_repeats"
    ),
    "make sweep NAME=sasrec/movielens_100k SPACE=experiments/sweeps/sasrec_losses_grid.yaml": Elsewhere(
        "recipes/test_sweep.py::test_a_table_of_ablations_reads_the_test_set_and_says_so"
    ),
    "make sweep NAME=sasrec/movielens_100k SPACE=... N=50 SLURM=1 GPUS=1 TIME=2:00:00 JOBS=8": Elsewhere(
        "slurm/test_cluster.py::test_trials_of_a_sweep_are_an_array_that_shares_them"
    ),
    "make report NAME=sasrec/movielens_100k": Elsewhere(
        "recipes/test_page.py::test_settings_say_where_they_came_from"
    ),
    'make report NAMES="tallrec/movie_64shot sasrec/tallrec_movie_64shot"': Elsewhere(
        "recipes/test_page.py::test_settings_say_where_they_came_from"
    ),
    f'{SASREC} ARGS="logger=wandb logger.wandb.log_scores=true"': Elsewhere(
        "recipes/test_page.py::test_asked_scores_are_an_artifact"
    ),
    "make dashboard PUBLISH=1": Elsewhere(
        "recipes/test_page.py::test_publishing_without_an_account_is_refused"
    ),
    # The walk
    "make exp NAME=fading/movielens_100k": Elsewhere(WALK),
    'make compare NAMES="fading/movielens_100k sasrec/movielens_100k"': Elsewhere(WALK),
    'make test ARGS="-k fading"': Elsewhere(WALK),
    "make serve NAME=sasrec/movielens_100k PORT=8000": Elsewhere(
        "recipes/test_serve.py::test_answers_are_those_of_the_evaluation"
    ),
    "curl -s http://127.0.0.1:8000/recommend -H 'Content-Type: application/json' -d "
    '\'{"history": ["Toy Story", "172"], "k": 5, "exclude": ["Speed (1994)"]}\'': Elsewhere(
        "recipes/test_serve.py::test_two_hundred_at_once_get_what_python_gets"
    ),
}  # fmt: skip

# Targets that stand in sentences and tables alone: the README tells them with NAME=... for a name.
TARGETS: dict[str, Way] = {
    "list": Ran("tallrec/movie_64shot", tiny=False),
    "show": Ran("stages.train.module.hidden_size: 16", variables={"NAME": "sasrec/movielens_100k"}),
    "images": Elsewhere("experiments/test_images.py::test_data_without_addresses_and_the_real_command"),
    "demo": Elsewhere("recipes/test_demo.py::test_lists_are_those_of_the_recommender"),
    "export": Elsewhere(
        "recipes/test_export.py::test_sasrec_outside_of_the_project_ranks_as_it_was_evaluated"
    ),
    "results": Elsewhere("experiments/test_report.py::test_seeds_become_a_mean_and_an_interval"),
    "beyond": Elsewhere("recipes/test_compare.py::test_what_lists_are_like"),
    "plots": Elsewhere("recipes/test_compare.py::test_charts_are_written_and_printed"),
    "verify": Elsewhere(
        "experiments/test_verify.py::test_a_run_is_compared_and_the_seeds_are_averaged"
    ),
    "table": Elsewhere("recipes/test_readme.py::test_a_cell_of_a_papers_table_is_run"),
    "replay": Elsewhere(
        "recipes/test_faults.py::test_a_loss_that_is_no_number_stops_with_its_batch"
    ),
    "lint": Left("style, which .ci/run looks at first"),
    "clean": Left("removes caches that other tests are using"),
    "bench": Left("minutes, and other libraries; its parts: experiments/test_bench_sequential.py"),
    "bench-peers": Left("installs other libraries"),
    "bench-data": Left("needs bench-peers"),
    "bench-evaluation": Elsewhere(
        "lightning_modules/test_large_catalogue.py::test_a_million_items_fit_into_a_fraction_of_four_gigabytes"
    ),
}  # fmt: skip
