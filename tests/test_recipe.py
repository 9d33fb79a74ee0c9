from __future__ import annotations

import pytest
from transformers import TrainingArguments

import lte
from lte.errors import ConfigError
from lte.recipe import dump_recipe, load_recipe

FLAGS = {"model": "m", "data": "d.txt", "out": "o", "task.name": "lm"}


def write(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_later_sources_win(tmp_path):
    path = write(tmp_path, "model: a\ndata: d\nout: o\ntask: lm\ntraining: {eta: 1, learning_rate: 1e-3}\nseed: 4\n")
    recipe = load_recipe(path, {"training.eta": 2.0, "model": "b", "seed": None}, ["training.eta=3"])
    args = recipe.arguments(lte.LTETrainingArguments, output_dir=str(tmp_path))
    assert (recipe.model, recipe.seed, args.eta, args.learning_rate, args.seed) == ("b", 4, 3.0, 1e-3, 4)
    assert recipe.method() == lte.SelfPredictionConfig(seed=4)


def test_a_recipe_survives_being_written(tmp_path):
    recipe = load_recipe(None, {**FLAGS, "sparsity.expert_size": 16, "training.eta": 0.5}, ["dtype=bfloat16"])
    assert load_recipe(write(tmp_path, dump_recipe(recipe)), {}, []) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("- a\n", "must hold a mapping"),
        ("model: m\ndata: d\nout: o\n", "task is missing; give --task"),
        ("model: m\ndata: d\nout: o\ntask: {name: lm, contxt_length: 3}\n", "did you mean 'context_length'"),
        ("model: m\ndata: d\nout: o\ntask: poetry\n", "unknown task .poetry."),
        ("model: m\ndata: d\nout: o\ntask: lm\ndtype: int8\n", "dtype='int8'"),
        ("model: m\ndata: d\nout: o\ntask: lm\nseed: -1\n", "seed=-1"),
        ("model: m\ndata: d\nout: o\ntask: [lm]\n", "must name a task: lm, classify"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text), {}, [])


def test_missing_recipe_file(tmp_path):
    with pytest.raises(ConfigError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml", {}, [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.output_dir=x", "unknown recipe key 'training.output_dir'"),
        ("training.learning_rate=fast", "training.learning_rate='fast' is not a number"),
        ("training.eval_strategy=sometimes", "training: "),
        ("training.eta=-1", "eta=-1"),
        ("training.stage1_steps=abc", "training.stage1_steps='abc' is not a number"),
        ("training.stage1_epochs=.nan", "stage1_epochs=nan is not a finite number"),
        ("training.stage2_epochs=-0.5", "stage2_epochs=-0.5 must be a number, not negative"),
        ("training.stage1_scheduler=foo", "training: "),
        ("training.lr_scheduler_type=cosine_with_min_lr", "training: "),
        ("training.per_device_train_batch_size=0", "training.per_device_train_batch_size=0 must be at least 1"),
        ("training.gradient_accumulation_steps=0", "training.gradient_accumulation_steps=0 must be at least 1"),
        ("training.learning_rate=-1", "training.learning_rate=-1.0 must not be negative"),
        ("training.eval_strategy=steps", "training.eval_strategy is not used; run `lte evaluate`"),
        ("training.eval_delay=3", "training.eval_delay is not used; run `lte evaluate`"),
        ("training.resume_from_checkpoint=x", "training.resume_from_checkpoint is not used; give --resume"),
        ("training.optim_args=x", "training.optim_args='x' is not of the form name=value,name=value"),
        ("training.optim=lomo", "training.optim=lomo: You need to install `lomo_optim`"),
        ("training.torch_compile_mode=x", "training.torch_compile_mode=x must be one of default, "),
        ("training.gradient_checkpointing_kwargs=x", "_kwargs='x' is not a mapping; give {name: value}"),
        ("training.label_names=x", r"training.label_names='x' is not a list; give \[name, name\]"),
        ("training.deepspeed=x", "training: No package metadata was found for The 'deepspeed"),
        ("training.use_liger_kernel=true", "use_liger_kernel=True would put dense FFNs where the sparse ones are"),
        ("training.num_train_epochs=3", "give stage1_epochs and stage2_epochs"),
    ],
)
def test_bad_training_values(tmp_path, setting, message):
    recipe = load_recipe(None, {**FLAGS, "preset": "paper", "training.eta": 1.0}, [setting])
    with pytest.raises(ConfigError, match=message):
        recipe.arguments(lte.LTETrainingArguments, output_dir=str(tmp_path))


def test_a_dense_run_says_that_liger_is_missing(tmp_path):
    recipe = load_recipe(None, FLAGS, ["training.use_liger_kernel=true"])
    with pytest.raises(ConfigError, match="needs the package liger-kernel; install it or leave it out"):
        recipe.arguments(TrainingArguments, output_dir=str(tmp_path))


def test_settings_for_the_optimizer_and_the_compiler_that_are_right(tmp_path):
    settings = ["optim=adamw_torch", "optim_args=weight_decay=0.1,foreach=False", "torch_compile_mode=reduce-overhead"]
    recipe = load_recipe(None, {**FLAGS, "training.eta": 1.0}, [f"training.{setting}" for setting in settings])
    args = recipe.arguments(lte.LTETrainingArguments, output_dir=str(tmp_path))
    assert (args.optim_args, args.torch_compile_mode) == ("weight_decay=0.1,foreach=False", "reduce-overhead")


def test_lte_settings_are_unknown_to_a_dense_run(tmp_path):
    recipe = load_recipe(None, FLAGS, ["training.eta=1"])
    with pytest.raises(ConfigError, match=r"unknown recipe key 'training.eta'"):
        recipe.arguments(TrainingArguments, output_dir=str(tmp_path))


def test_short_and_empty_sections_can_be_added_to(tmp_path):
    path = write(tmp_path, "model: m\ndata: d\nout: o\ntask: lm\ntraining:\n")
    settings = ["task.context_length=64", "training.save_strategy=no", "training.target_sparsity=0.5"]
    recipe = load_recipe(path, {"task.name": "lm"}, settings)
    assert recipe.task.context_length == 64
    assert recipe.arguments(lte.LTETrainingArguments, output_dir=str(tmp_path)).save_strategy.value == "no"


def test_set_that_is_not_yaml():
    with pytest.raises(ConfigError, match="--set training.eta is not valid YAML"):
        load_recipe(None, FLAGS, ["training.eta=[1"])


def test_epochs_are_refused_for_two_stages_wherever_they_stand(tmp_path):
    recipe = load_recipe(None, {**FLAGS, "training.num_train_epochs": 5.0}, ["training.eta=1", "training.stages=2"])
    with pytest.raises(ConfigError, match="give stage1_epochs and stage2_epochs"):
        recipe.arguments(lte.LTETrainingArguments, output_dir=str(tmp_path))


def test_the_paper_recipe_is_the_published_one_and_can_be_changed(tmp_path):
    paper = {**FLAGS, "preset": "paper", "training.eta": 1.0}
    recipe = load_recipe(None, paper, ["sparsity.grouping=random", "training.lambda_sep=0.25"])
    args = recipe.arguments(lte.LTETrainingArguments, output_dir=str(tmp_path))
    assert (args.stages, args.lambda_sep) == (2, 0.25)
    assert (recipe.method().grouping, recipe.method().router_init) == ("random", "random")
    assert load_recipe(None, paper, []).method().grouping == "kmeans"
    with pytest.raises(ConfigError, match="preset='magic'.*known presets: single-stage, paper"):
        load_recipe(None, {**paper, "preset": "magic"}, [])
