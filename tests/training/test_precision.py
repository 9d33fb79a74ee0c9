"""bf16 weights: routers stay float32, steps that bf16 cannot hold arrive on average, and a resumed run is the same."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments

from lte.errors import ConfigError
from lte.hub import load_dense
from lte.models import create
from lte.nn import sparse_ffns
from lte.recipe import Recipe, load_recipe
from lte.run_folder import RUN_FILE
from lte.runs import check_recipe, finetune, make_sparse, train
from lte.training import optimizer_for
from tests.training.common import sparse_model, trainer

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
EIGHT_BITS = (torch.bfloat16, "OptimState8bit")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: extra bf16")


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
    assert {value.dtype for key, value in whole.items() if ".router." in key} == (
        {torch.float32, torch.int64} if sparse else set()
    )
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


@needs_torchao
def test_in_python_bf16_weights_choose_their_optimizer_and_routers_stay_float32(tmp_path, caplog):
    run = trainer(tmp_path, sparse_model().to(torch.bfloat16), stages=1, max_grad_norm=0.1, router_learning_rate=1e-3)
    before = [ffn.router.weight.detach().clone() for ffn in sparse_ffns(run.model)]
    run.train()
    assert all(not torch.equal(ffn.router.weight, b) for ffn, b in zip(sparse_ffns(run.model), before, strict=True))
    optimizer = run.optimizer.optimizer
    assert type(optimizer).__name__ == "AdamW8bit"
    assert optimizer.bf16_stochastic_round
    routers = {id(p) for ffn in sparse_ffns(run.model) for p in ffn.router.parameters()}
    assert routers
    seen = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert p.dtype == (torch.float32 if id(p) in routers else torch.bfloat16)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[p][key]
                assert moment.dtype == torch.float32 or (moment.dtype, type(moment).__name__) == EIGHT_BITS
                seen.add((p.dtype, moment.dtype))
    assert seen >= {(torch.float32, torch.float32), (torch.bfloat16, torch.float32)}
    assert (torch.float32, torch.bfloat16) not in seen
    assert "rounded to nothing" not in caplog.text


@needs_torchao
@pytest.mark.parametrize("optim", ["default", "adamw_torch_8bit", "adamw_torch_4bit"])
def test_float32_weights_are_stepped_as_by_plain_adamw(optim, tmp_path):
    """In a group with a rate of its own, beside bf16 weights, and moved by less than bf16 could hold."""
    settings = {} if optim == "default" else {"optim": optim}
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=4.7e-5, **settings)
    torch.manual_seed(0)
    router, weight = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    stock = copy.deepcopy(router)
    cls, kwargs = optimizer_for(args, torch.nn.ModuleList([router, weight]))
    assert kwargs["bf16_stochastic_round"]
    rates = {"lr": 4.7e-6, "weight_decay": 0.1}
    ours = cls([{"params": list(weight.parameters())}, {"params": list(router.parameters()), **rates}], **kwargs)
    theirs = torch.optim.AdamW(stock.parameters(), **rates)
    for _ in range(5):
        for p, q in zip(router.parameters(), stock.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for p in weight.parameters():
            p.grad = torch.randn_like(p)
        before = weight.weight.clone()
        ours.step()
        theirs.step()
        assert not torch.equal(weight.weight, before)
    for p, q in zip(router.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-8, rtol=1e-6)
        assert ours.state[p]["exp_avg"].dtype == torch.float32
        assert type(ours.state[p]["exp_avg"]) is torch.Tensor


@needs_torchao
def test_rounding_follows_the_seed_and_the_step_and_leaves_the_random_state_alone(tmp_path):
    def stepped(seed: int, before: int) -> tuple[list[torch.Tensor], float]:
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3, seed=seed)
        weight = torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        cls, kwargs = optimizer_for(args, torch.nn.ParameterList([weight]))
        optimizer = cls([weight], **kwargs)
        torch.manual_seed(before)
        after = []
        for _ in range(2):
            before_step = weight.detach().clone()
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            after.append(weight.detach() - before_step)
        return after, float(torch.rand(()))

    (first, second), drawn = stepped(3, before=5)
    assert drawn == float(torch.manual_seed(5) and torch.rand(()))
    again, _ = stepped(3, before=6)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, stepped(4, before=5)[0][0])


@needs_torchao
def test_moments_follow_gradients_that_become_small(tmp_path):
    """bf16 would hold a second moment where it is: a thousandth per step is less than half a unit in its last place."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-5)
    weights = torch.nn.ParameterList([torch.ones(64, 64).bfloat16(), torch.ones(64).bfloat16()])
    cls, kwargs = optimizer_for(args, weights)
    optimizer = cls(weights.parameters(), **kwargs)
    moments = []
    for step in range(300):
        for p in weights:
            p.grad = torch.full_like(p, 1.0 if step < 100 else 0.0)
        optimizer.step()
        if step in (99, 299):
            states = [optimizer.state[p]["exp_avg_sq"] for p in weights]
            assert type(states[0]).__name__ == "OptimState8bit"
            moments.append([float(states[0].dequantize().float().mean()), float(states[1].mean())])
    for early, late in zip(*moments, strict=True):
        assert late / early == pytest.approx(0.999**200, rel=0.02)
    restored = cls([torch.nn.Parameter(p.detach().clone()) for p in weights], **kwargs)
    restored.load_state_dict(optimizer.state_dict())
    assert torch.equal(list(restored.state.values())[1]["exp_avg_sq"], states[1])


@needs_torchao
def test_without_a_compiler_the_step_runs_as_it_stands(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3)
    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    cls, kwargs = optimizer_for(args, model)
    optimizer = cls(model.parameters(), **kwargs)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", None)
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_an_optimizer_that_loses_steps_is_named_and_kept(tmp_path, caplog):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="adamw_torch")
    model = torch.nn.Linear(4, 4)
    assert optimizer_for(args, model)[0] is torch.optim.AdamW
    assert not caplog.records
    assert optimizer_for(args, model.to(torch.bfloat16))[0] is torch.optim.AdamW
    assert "optim=adamw_torch on bf16 weights" in caplog.text
    assert "rounded to nothing. Leave optim out" in caplog.text
    model.requires_grad_(False)
    caplog.clear()
    optimizer_for(args, model)
    assert not caplog.records


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dtype=bfloat16", r"bf16 weights needs .* pip install 'learn-to-be-efficient\[bf16\]', keep"),
        ("dtype=auto", r"bf16 weights needs"),
        ("dtype=float16", "dtype='float16': float16 weights cannot be trained.* use dtype=bfloat16"),
    ],
)
def test_what_cannot_train_is_refused_before_it_starts(setting, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = json.loads((folder / "dense" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in ("train", "finetune"):
        asked = recipe(folder, tmp_path / "out", setting, sparse=command == "train")
        asked = asked.model_copy(update={"model": str(tmp_path)})
        with pytest.raises(ConfigError, match=message):
            check_recipe(asked, command)
    check_recipe(recipe(folder, tmp_path / "out", setting), "sparsify")
    check_recipe(recipe(folder, tmp_path / "out", "dtype=bfloat16", "training.optim=adafactor"), "train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("settings", "kept"), [((), torch.bfloat16), (("dtype=float32",), torch.float32)])
def test_sparsify_keeps_the_dtype_of_the_checkpoint(settings, kept, folder, tmp_path):
    load_dense(folder / "dense", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(tmp_path / "dense")
    asked = recipe(folder, tmp_path / "out", *settings)
    dtype = {} if settings else {"dtype": None}
    make_sparse(asked.model_copy(update={"model": str(tmp_path / "dense"), **dtype}))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for key, value in weights.items() if ".router." not in key} == {kept}


@needs_torchao
def test_importing_lte_says_nothing():
    process = subprocess.run([sys.executable, "-c", "import lte, lte.runs"], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
