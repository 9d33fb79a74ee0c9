"""bf16 weights: routers stay float32, steps that bf16 cannot hold arrive on average, and a resumed run is the same."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import lte
from lte.errors import ConfigError
from lte.models import create
from lte.recipe import Recipe, load_recipe
from lte.runs import RUN_DEFAULTS, RUN_FILE, check_recipe, finetune, train
from lte.training import RepeatableRounding, rounding_callbacks

WORDS = "the cat sat on a mat and the dog saw a bird while rain fell over small green hills".split()  # noqa: SIM905
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None or shutil.which("g++") is None, reason="needs torchao and g++"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("precision")
    text = "\n".join(" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(1, 300))
    (root / "text.txt").write_text(text)
    create(CONFIG, str(root / "text.txt"), root / "dense", vocab_size=300)
    return root


def recipe(folder: Path, out: Path, *settings: str, sparse: bool = True) -> Recipe:
    flags = {"model": str(folder / "dense"), "data": str(folder / "text.txt"), "out": str(out), "task.name": "lm"}
    if sparse:
        flags |= {"sparsity.expert_size": 8, "sparsity.grouping": "random", "training.target_sparsity": 0.5}
    common = ["dtype=bfloat16", "task.context_length=16", "training.per_device_train_batch_size=4"]
    return load_recipe(None, flags, [*common, "training.max_steps=6", "training.learning_rate=1e-3", *settings])


def losses(out: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("run", [train, finetune])
def test_a_run_in_bf16_learns_and_resumes_to_the_bit(run, folder, tmp_path):
    sparse = run is train
    settings = ["training.max_steps=12", "training.save_steps=4", "training.save_total_limit=5"]
    asked = recipe(folder, tmp_path / "out", *settings, sparse=sparse)
    run(asked)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for key, value in whole.items() if ".router." not in key} == {torch.bfloat16}
    assert {value.dtype for key, value in whole.items() if ".router." in key} == ({torch.float32} if sparse else set())
    loss = losses(tmp_path / "out", "task_loss" if sparse else "loss")
    assert sum(loss[-3:]) < sum(loss[:3]) - 0.3

    for left in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / left)
    for left in (RUN_FILE, "model.safetensors"):
        (tmp_path / "out" / left).unlink()
    assert run(asked, resume=True)["steps"] == 12
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@needs_torchao
@pytest.mark.slow
def test_steps_below_what_bf16_can_hold_arrive_on_average(folder, tmp_path):
    """Weights of 1 at a learning rate of 1e-4: a step is a fortieth of a unit in the last place."""
    moved = {}
    for name, settings in {"rounding": [], "plain": ["training.optim=adamw_torch"]}.items():
        options = ["training.learning_rate=1e-4", "training.save_strategy=no", "training.max_steps=3", *settings]
        finetune(recipe(folder, tmp_path / name, *options, sparse=False))
        norm = load_file(tmp_path / name / "model.safetensors")["model.norm.weight"].float()
        moved[name] = (norm - 1).abs()
    assert moved["plain"].max() == 0
    assert moved["rounding"].max() > 0
    assert moved["rounding"].mean() < 2e-3


def test_bf16_weights_choose_their_optimizer_and_say_so(tmp_path, caplog, monkeypatch, folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: name)
    defaults = {"output_dir": str(tmp_path), **RUN_DEFAULTS}
    for cls, sparse in ((lte.LTETrainingArguments, True), (TrainingArguments, False)):
        caplog.clear()
        args = recipe(folder, tmp_path, sparse=sparse).arguments(cls, **defaults)
        assert (args.optim, args.optim_args) == ("adamw_torch_8bit", "bf16_stochastic_round=True")
        assert "training with optim=adamw_torch_8bit" in caplog.text
        assert [type(callback) for callback in rounding_callbacks(args)] == [RepeatableRounding]
    caplog.clear()
    for setting in ("training.optim=adafactor", "dtype=float32", "dtype=auto"):
        args = recipe(folder, tmp_path, setting).arguments(lte.LTETrainingArguments, **defaults)
        assert args.optim == ("adafactor" if "optim" in setting else "adamw_torch_fused")
        assert not rounding_callbacks(args)
    assert not caplog.records
    config = json.loads((folder / "dense" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = recipe(folder, tmp_path, "dtype=auto").model_copy(update={"model": str(tmp_path)})
    assert flags.arguments(lte.LTETrainingArguments, **defaults).optim == "adamw_torch_8bit"


@pytest.mark.parametrize(
    ("setting", "missing", "message"),
    [
        ("dtype=bfloat16", "torchao", r"dtype='bfloat16' needs .* pip install 'learn-to-be-efficient\[bf16\]', or"),
        ("dtype=bfloat16", "compiler", r"dtype='bfloat16' needs a C\+\+ compiler.* install g\+\+, or"),
        ("dtype=float16", "", "dtype='float16': float16 weights cannot be trained.* use dtype=bfloat16"),
    ],
)
def test_what_cannot_train_is_refused_before_it_starts(setting, missing, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing == "torchao" else object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    for command in ("train", "finetune"):
        asked = recipe(folder, tmp_path / "out", setting, "training.use_cpu=true", sparse=command == "train")
        with pytest.raises(ConfigError, match=message):
            check_recipe(asked, command)
    check_recipe(recipe(folder, tmp_path / "out", setting), "sparsify")
    assert not (tmp_path / "out").exists()


def test_rounding_follows_the_seed_and_the_step_and_leaves_the_training_state_alone(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), seed=3, use_cpu=True)

    def drawn(step: int, before: int) -> tuple[float, float]:
        callback, state = RepeatableRounding(), type("State", (), {"global_step": step})
        torch.manual_seed(before)
        callback.on_pre_optimizer_step(args, state, None)
        inside = float(torch.rand(()))
        callback.on_optimizer_step(args, state, None)
        return inside, float(torch.rand(()))

    assert drawn(1, before=5)[0] == drawn(1, before=6)[0] != drawn(2, before=5)[0]
    torch.manual_seed(5)
    assert drawn(1, before=5)[1] == float(torch.manual_seed(5) and torch.rand(()))
