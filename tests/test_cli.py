"""The commands as a user types them: what works, and one line with exit code 2 for what cannot."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lte
import lte_start
from lte.cli import app
from lte.errors import ConfigError, LTEError
from lte.models import create
from lte.training import JsonLinesLog, last_complete_checkpoint
from tests.models import build

WORDS = "the cat sat on a mat and the dog saw a bird while rain fell over small green hills".split()  # noqa: SIM905
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text, prompt -> target rows, and a dense model with a tokenizer."""
    root = tmp_path_factory.mktemp("cli")
    text = "\n".join(" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(1, 300))
    (root / "text.txt").write_text(text)
    rows = [{"mr": f"name[{WORDS[i % 18]}]", "ref": f"{WORDS[i % 18]} is a cat."} for i in range(30)]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (root / "empty.txt").write_text("")
    create(CONFIG, str(root / "text.txt"), root / "dense", vocab_size=300)
    return root


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def fails(*words: object) -> str:
    """The error line of a command that must fail; what turns it into exit code 2 is tested in a real process."""
    result = run(*words)
    assert isinstance(result.exception, LTEError), result.output + repr(result.exception)
    return " ".join(str(result.exception).split())


def train_words(folder: Path, out: Path, *more: object) -> list[object]:
    return [
        *("train", "--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt", "--out", out),
        *("--expert-size", 8, "--grouping", "random", "--context-length", 16, "--batch-size", 4),
        *("--preset", "paper", "--eta", 1, "--set", "training.stage1_steps=3", "--set", "training.stage2_steps=2"),
        *more,
    ]


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    out = folder / "sparse"
    result = run(*train_words(folder, out))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return out


def test_train_leaves_a_sparse_model_and_its_record(trained):
    lte.load(trained)
    record = json.loads((trained / "lte_run.json").read_text())
    assert list(record["seconds_of"]) == ["reading", "calibration", "grouping", "routers", "training"]
    assert 0.1 < record["peak_memory_gb"]["host"] < 200
    assert record["steps"] == 5
    assert len(record["sparsity_per_layer"]) == 2
    lines = [json.loads(line) for line in (trained / "training_log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if "stage" in line] == [1, 1, 1, 2, 2]


def test_a_training_that_went_wrong_is_told_and_exits_with_3(folder, tmp_path, monkeypatch):
    for allowance in ("BAND", "ON_TARGET", "SAMPLING"):
        monkeypatch.setattr(f"lte.training.tracker.{allowance}", 0.0)
    words = ("train", "--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt", "--expert-size", 8)
    more = ("--grouping", "random", "--context-length", 16, "--batch-size", 2, "--target-sparsity", 0.9)
    rates = ("--learning-rate", 10, "--set", "training.max_steps=12", "--set", "training.warmup_steps=0")
    result = run(*words, *more, *rates, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "lte_run.json").read_text())
    said = " ".join(result.output.split())
    assert f"{record['steps_out_of_band']} of 12 steps were not at the sparsity wanted" in said
    assert record["task_loss"]["last"] > 1.05 * record["task_loss"]["first"]
    assert "the model has lost more to the target than training gave back" in said
    assert f"off target: the model was trained at {record['trained_sparsity']:.1%}, not 90.0%" in said
    assert result.exit_code == 3
    lte.load(tmp_path / "out")


def test_evaluate_writes_every_key(trained, folder, tmp_path):
    result = run("evaluate", trained, "--task", "lm", "--data", folder / "text.txt", "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "f.json").read_text())
    keys = {
        "metric",
        "value",
        "sparsity",
        "sparsity_per_layer",
        "gflops_per_token",
        "tokens",
        "model",
        "task",
        "data",
    }
    assert keys | {"seed", "versions"} <= record.keys()
    assert record["metric"] == "perplexity"
    assert set(record["gflops_per_token"]) == {"dense", "sparse", "router"}
    assert record["sparsity"] == pytest.approx(sum(record["sparsity_per_layer"]) / 2, abs=1e-6)


def test_evaluate_dense_baseline(folder, tmp_path):
    words = ("evaluate", folder / "dense", "--data", folder / "text.txt", "--json", tmp_path / "f.json")
    assert "is a dense checkpoint" in fails(*words)
    assert run(*words, "--dense").exit_code == 0
    record = json.loads((tmp_path / "f.json").read_text())
    assert record["sparsity"] == 0
    assert record["gflops_per_token"]["sparse"] == record["gflops_per_token"]["dense"]


def test_evaluate_prompt_target(trained, folder):
    columns = (
        "--prompt-column",
        "mr",
        "--target-column",
        "ref",
        "--max-new-tokens",
        5,
        "--context-length",
        48,
    )
    result = run("evaluate", trained, "--data", folder / "rows.jsonl", *columns)
    assert result.exit_code == 0, result.output
    assert "rougeL" in result.output


def test_generate(trained):
    result = run("generate", trained, "--prompt", "the cat", "--max-new-tokens", 4)
    assert result.exit_code == 0
    assert "the cat" in result.output


def test_inspect(trained, tmp_path):
    result = run("inspect", trained, "--json", tmp_path / "f.json")
    assert result.exit_code == 0
    record = json.loads((tmp_path / "f.json").read_text())
    assert [layer["experts"] for layer in record["layers"]] == [8, 8]
    assert record["parameters"]["router"] == 2 * (8 * 32 + 8)
    assert record["layers"][0]["mflops"]["dense"] == pytest.approx(2 * 3 * 32 * 64 / 2**20)


def test_train_to_a_target_then_turn_the_dial(folder, tmp_path):
    out = tmp_path / "target"
    words = ("train", "--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt", "--out", out)
    result = run(*words, "--expert-size", 8, "--context-length", 16, "--target-sparsity", 0.4, "--epochs", 1)
    assert result.exit_code == 0, result.output + repr(result.exception)
    record = tmp_path / "f.json"
    run("evaluate", out, "--data", folder / "text.txt", "--json", record)
    assert json.loads(record.read_text())["sparsity"] == pytest.approx(0.4, abs=0.05)
    result = run("calibrate", out, "--data", folder / "text.txt", "--target-sparsity", "0.3,0.6", "--json", record)
    assert result.exit_code == 0, result.output + repr(result.exception)
    points = json.loads(record.read_text())["points"]
    assert [point["sparsity"] for point in points] == pytest.approx([0.3, 0.6], abs=0.01)
    same = run("evaluate", out, "--data", folder / "text.txt").output
    (tmp_path / "other.txt").write_text("Q" * 2000)
    other = run("evaluate", out, "--data", tmp_path / "other.txt", "--json", record).output
    found = json.loads(record.read_text())
    assert found["expected_sparsity"] == points[1]["sparsity"]
    assert abs(found["sparsity"] - 0.6) > 0.01
    assert ["lte calibrate" in output for output in (same, other)] == [False, True]
    model = lte.load(out)
    assert [ffn.router.threshold for ffn in lte.nn.sparse_ffns(model)] == points[1]["thresholds"]
    model.set_sparsity(0.45)
    threshold = lte.nn.sparse_ffns(model)[0].router.threshold
    assert points[0]["thresholds"][0] < threshold < points[1]["thresholds"][0]


@pytest.mark.parametrize("method", ["lte", "oracle"])
def test_sparsify_without_training(folder, tmp_path, method):
    out, record = tmp_path / "sparse", tmp_path / "f.json"
    words = ("sparsify", "--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt", "--out", out)
    more = ("--expert-size", 8, "--context-length", 16, "--set", f"sparsity.method={method}")
    result = run(*words, *more, "--target-sparsity", 0.4)
    assert result.exit_code == 0, result.output + repr(result.exception)
    both = ("--baseline", folder / "dense", "--against", folder / "dense")
    result = run("evaluate", out, "--data", folder / "text.txt", *both, "--json", record)
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = json.loads(record.read_text())
    assert found["sparsity"] == pytest.approx(0.4, abs=0.03)
    assert found["baseline"]["sparsity"] == 0
    assert found["value"] != found["baseline"]["value"]
    assert found["extras"]["kl_divergence"] > 0
    assert 0 <= found["extras"]["same_top"] <= 1
    assert found["baseline"]["extras"] | {"cross_entropy": 0} == {
        "kl_divergence": pytest.approx(0, abs=1e-6),
        "same_top": 1,
        "cross_entropy": 0,
    }
    assert str(folder / "dense").rpartition("/")[2] in result.output
    assert "must lie between 0 and 1" in fails(*words[:-1], tmp_path / "other", *more, "--target-sparsity", 30)
    assert "no model folder" in fails("evaluate", out, "--data", folder / "text.txt", "--baseline", folder / "none/x/y")


@pytest.mark.parametrize("command", ["sparsify", "train"])
def test_a_target_is_the_share_of_a_method_that_has_one(folder, tmp_path, command):
    words = (
        command,
        "--model",
        folder / "dense",
        "--task",
        "lm",
        "--data",
        folder / "text.txt",
        "--context-length",
        16,
    )
    more = ("--set", "sparsity.method=kla", "--set", "training.max_steps=2", "--target-sparsity", 0.75)
    result = run(*words, *more, "--out", tmp_path / "sparse")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert json.loads((tmp_path / "sparse" / "lte_run.json").read_text())["sparsity"] == pytest.approx(0.75)
    assert lte.load(tmp_path / "sparse").config.quantization_config.method == lte.KLAConfig(sparsity=0.75)
    error = fails(*words, *more, "--set", "sparsity.sparsity=0.5", "--out", tmp_path / "other")
    assert "target_sparsity=0.75 and sparsity.sparsity=0.5: give one" in error


def test_methods_are_listed(tmp_path):
    result = run("methods", "--json", tmp_path / "methods.json")
    assert result.exit_code == 0
    assert "sparseinfer" in result.output
    rows = {row["method"]: row for row in json.loads((tmp_path / "methods.json").read_text())["methods"]}
    assert rows["sparseinfer"]["ffns"] == "with a ReLU"
    assert rows["kla"]["sparsity"] == "fixed share"
    assert all(all(row.values()) for row in rows.values())


def test_calibrate_says_what_is_wrong(folder, trained):
    words = ("calibrate", trained, "--data", folder / "text.txt", "--target-sparsity")
    assert "'half' is no list of numbers" in fails(*words, "half")
    assert "must lie between 0 and 1" in fails(*words, "1.5")
    assert "is a dense checkpoint" in fails("calibrate", folder / "dense", *words[2:], 0.5)
    assert "is not a folder" in fails("calibrate", folder / "none", *words[2:], 0.5)


def test_calibrate_reads_data_as_evaluate_does(folder, trained, tmp_path):
    data = tmp_path / "splits"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text(json.dumps({"story": (folder / "text.txt").read_text()}) + "\n")
    model = shutil.copytree(trained, tmp_path / "model")
    words = ("calibrate", model, "--data", data, "--target-sparsity", 0.5)
    assert "set split" in fails(*words, "--text-column", "story")
    result = run(*words, "--text-column", "story", "--split", "validation", "--context-length", 8)
    assert result.exit_code == 0, result.output + repr(result.exception)
    result = run("inspect", model)
    moved = lte.nn.sparse_ffns(lte.load(model))[0].router.threshold
    assert moved != 0.5
    assert f"threshold={moved:.4g}" in result.output.replace("\n", "")


def test_finetune_and_recipe_file(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {folder / 'dense'}\ndata: {folder / 'text.txt'}\nout: {tmp_path / 'tuned'}\n"
        "task: {name: lm, context_length: 16}\ntraining: {max_steps: 3, learning_rate: 1e-3}\n"
    )
    result = run("finetune", recipe, "--set", "training.max_steps=2")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert json.loads((tmp_path / "tuned" / "lte_run.json").read_text())["steps"] == 2
    run_again = run(
        "train", recipe, "--out", tmp_path / "sparse", "--set", "training={max_steps: 20, target_sparsity: 0.5}"
    )
    assert "not divisible" not in run_again.output
    assert run_again.exit_code == 0, run_again.output + repr(run_again.exception)


def test_a_dense_model_is_tuned_to_a_relu_and_methods_start_from_it(folder, tmp_path):
    flags = ("--task", "lm", "--data", folder / "text.txt", "--context-length", 16)
    dense = ("finetune", "--model", folder / "dense", *flags, "--out", tmp_path / "relu")
    steps = ("--set", "training.max_steps=2")
    assert "at most activation" in fails(*dense, *steps, "--set", "sparsity.expert_size=8")
    assert run(*dense, *steps, "--set", "sparsity.activation=relu").exit_code == 0
    config = json.loads((tmp_path / "relu" / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert "quantization_config" not in config
    more = ("--set", "sparsity.method=sparseinfer", "--target-sparsity", 0.5, "--out", tmp_path / "out")
    assert "ReLU" in fails("sparsify", "--model", folder / "dense", *flags, *more)
    assert run("sparsify", "--model", tmp_path / "relu", *flags, *more).exit_code == 0


@pytest.fixture(scope="module", params=["train", "finetune"])
def interrupted(request, folder, tmp_path_factory) -> tuple[list[object], Path]:
    """The command of a run, and what it left after two steps of four."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    words = [request.param, "--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt"]
    words += ["--context-length", 16, "--set", "training.max_steps=4", "--set", "training.save_steps=2"]
    words += ["--target-sparsity", 0.3] if request.param == "train" else []
    assert run(*words, "--out", out).exit_code in (0, 3)  # so few steps may end elsewhere
    (out / "lte_run.json").unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    return words, out


NOT_GONE_ON_FROM = [
    *(
        (name, content)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        for content in (None, b"", b"junk")
    ),
    *(("config.json", content) for content in (None, b"{", b"[]")),
    ("model.safetensors", b"junk"),
]


@pytest.mark.parametrize(("name", "content"), NOT_GONE_ON_FROM)
def test_a_checkpoint_that_lacks_something_is_not_gone_on_from(interrupted, tmp_path, name, content):
    words, left = interrupted
    out = tmp_path / "out"
    shutil.copytree(left, out)
    file = out / "checkpoints" / "checkpoint-2" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    before = sorted((str(path), path.stat().st_size) for path in out.rglob("*"))
    said = fails(*words, "--out", out, "--resume")
    assert "checkpoint-2" in said
    assert sorted((str(path), path.stat().st_size) for path in out.rglob("*")) == before


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_record_that_cannot_be_read_is_named_before_anything_is_done(interrupted, tmp_path, content):
    words, left = interrupted
    out = tmp_path / "out"
    shutil.copytree(left, out)
    (out / "lte_run.json").write_text(content)
    assert "lte_run.json" in fails(*words, "--out", out, "--resume")


def test_calibration_that_cannot_write_its_record_changes_nothing(folder, tmp_path):
    flags = ("--data", folder / "text.txt", "--context-length", 16)
    out = tmp_path / "out"
    sparse = ("sparsify", "--model", folder / "dense", "--task", "lm", *flags, "--target-sparsity", 0.4, "--out", out)
    assert run(*sparse).exit_code == 0
    (out / "lte_run.json").write_text("[]")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "lte_run.json" in fails("calibrate", out, *flags, "--target-sparsity", 0.3)
    assert "lte_run.json" in fails("inspect", out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "lte_run.json").unlink()
    with (out / "run.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is being written to" in fails("calibrate", out, *flags, "--target-sparsity", 0.3)


def test_quantising_leaves_what_is_beside_its_folder(folder, tmp_path):
    for name in ("m.partial", "x.partial"):
        shutil.copytree(folder / "dense", tmp_path / name)
    assert run("quantize", folder / "dense", "--weights", "int8", "--out", tmp_path / "m").exit_code == 0
    assert run("quantize", tmp_path / "x.partial", "--weights", "int8", "--out", tmp_path / "x").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.partial", "x", "x.partial"]
    assert (tmp_path / "x.partial" / "model.safetensors").is_file()
    assert (tmp_path / "m").stat().st_mode & 0o777 == (tmp_path / "m.partial").stat().st_mode & 0o777


@pytest.mark.parametrize("setting", ["report_to=wandbb", "train_sampling_strategy=x"])
def test_settings_that_are_refused_late_lose_nothing(folder, tmp_path, setting):
    flags = ("--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt", "--context-length", 16)
    words = ("train", *flags, "--target-sparsity", 0.3, "--set", "training.max_steps=1", "--out", tmp_path / "out")
    assert run(*words).exit_code in (0, 3)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert "training" in fails(*words, "--overwrite", "--set", f"training.{setting}")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_init(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt_neox"}))
    words = (
        "init",
        "--config",
        tmp_path / "config.json",
        "--data",
        folder / "text.txt",
        "--out",
        tmp_path / "new",
    )
    assert run(*words, "--vocab-size", 300).exit_code == 0
    assert "is not empty" in fails(*words, "--vocab-size", 300)


def test_resume_of_a_complete_run_trains_nothing(folder, trained):
    before = (trained / "model.safetensors").read_bytes()
    assert run(*train_words(folder, trained, "--resume")).exit_code == 0
    assert (trained / "model.safetensors").read_bytes() == before
    assert "training differ" in fails(*train_words(folder, trained, "--resume", "--eta", 3))


def test_resume_goes_on_from_the_last_checkpoint(folder, tmp_path):
    """What a kill during the last save leaves: checkpoints, but no finished model."""
    out = tmp_path / "run"
    assert run(*train_words(folder, out, "--set", "training.save_steps=2")).exit_code == 0
    whole = (out / "model.safetensors").read_bytes()
    for cut in ([], ["checkpoint-5"]):
        (out / "lte_run.json").unlink()
        (out / "model.safetensors").unlink()
        for name in cut:
            (out / "checkpoints" / name / "trainer_state.json").unlink()
        result = run(*train_words(folder, out, "--set", "training.save_steps=2", "--resume"))
        assert result.exit_code == 0, result.output + repr(result.exception)
        assert (out / "model.safetensors").read_bytes() == whole


def test_missing_model_folder(folder, tmp_path):
    error = fails(*train_words(folder, tmp_path / "x", "--model", tmp_path / "nowhere"))
    assert "no model folder" in error
    assert not (tmp_path / "x").exists()


def test_empty_data_file(folder, tmp_path):
    assert "empty" in fails(*train_words(folder, tmp_path / "x", "--data", folder / "empty.txt"))
    assert not (tmp_path / "x").exists()


def test_missing_data_file(folder, tmp_path):
    assert "no such file" in fails(*train_words(folder, tmp_path / "x", "--data", folder / "none.txt"))


def test_indivisible_expert_size(folder, tmp_path):
    error = fails(*train_words(folder, tmp_path / "x", "--expert-size", 24))
    assert error.startswith("d_ff=64 is not divisible by expert_size=24; choose one of 4, 8, 16, 32, 64")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.etaa=2", "unknown recipe key 'training.etaa'; did you mean 'eta'?"),
        ("sparsity.expertsize=2", "unknown key 'expertsize'; did you mean 'expert_size'?"),
        ("task.contextlength=2", "unknown key 'contextlength'; did you mean 'context_length'?"),
        ("modle=x", "unknown key 'modle'; did you mean 'model'?"),
        (
            "sparsity.method=magic",
            "unknown method 'magic'; known methods: bank-topk, cats, ",
        ),
        ("training.eta=much", "training.eta='much' is not a number"),
        ("training", "--set 'training' is not of the form key=value"),
    ],
)
def test_unknown_recipe_key(folder, tmp_path, setting, message):
    assert message in fails(*train_words(folder, tmp_path / "x", "--set", setting))
    assert not (tmp_path / "x").exists()


def test_out_folder_that_is_not_empty(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    assert "is not empty; use --resume, --overwrite or another --out" in fails(*train_words(folder, tmp_path))
    assert "was not made by lte" in fails(*train_words(folder, tmp_path, "--overwrite"))
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_out_folder_that_holds_the_model(folder, trained, tmp_path):
    for flag in ("--overwrite", "--resume"):
        error = fails(*train_words(folder, folder / "dense", flag))
        assert "which the run reads; choose another --out" in error
    assert (folder / "dense" / "model.safetensors").is_file()
    (tmp_path / "mine.txt").write_text("keep")
    assert "holds no run of lte to resume" in fails(*train_words(folder, tmp_path, "--resume"))
    assert "contradict each other" in fails(*train_words(folder, trained, "--resume", "--overwrite"))


def test_generate_beyond_the_positions(trained):
    assert "exceed the model's 64 positions; ask for at most" in fails(
        "generate", trained, "--prompt", "the cat", "--max-new-tokens", 100
    )


def test_evaluation_takes_the_task_of_the_run(trained, folder, tmp_path):
    """Without flags the context length is that of training."""
    values = []
    for flags in ((), ("--context-length", 16), ("--context-length", 32)):
        file = tmp_path / "f.json"
        assert run("evaluate", trained, "--data", folder / "text.txt", "--json", file, *flags).exit_code == 0
        values.append(json.loads(file.read_text())["value"])
    assert values[0] == values[1] != values[2]
    assert "is a folder; name a file" in fails("evaluate", trained, "--data", folder / "text.txt", "--json", tmp_path)


def test_a_result_overwrites_nothing_but_a_result(trained, folder, tmp_path):
    data, broken = folder / "text.txt", tmp_path / "broken.json"
    broken.write_text("{")
    record = trained / "lte_run.json"
    for target in (data, folder / "dense" / "config.json", record, trained / "training_log.jsonl", broken):
        before = target.read_bytes()
        for words in (("evaluate", trained, "--data", data), ("inspect", trained), ("methods",), ("tasks",)):
            assert "is no result of lte: it is not overwritten" in fails(*words, "--json", target)
        assert target.read_bytes() == before
    assert "is no folder one can write to" in fails("methods", "--json", data / "f.json")
    for _ in range(2):
        assert run("methods", "--json", tmp_path / "new" / "f.json").exit_code == 0
    assert json.loads((tmp_path / "new" / "f.json").read_text())["command"].startswith("lte")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.json"]


def test_evaluation_knows_a_classifier(folder, tmp_path):
    rows = [{"text": word, "label": int("a" in word)} for word in WORDS]
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = ("--data", tmp_path / "labels.jsonl")
    flags = ("--model", folder / "dense", "--task", "classify", "--out", tmp_path / "out", "--context-length", 16)
    assert run("finetune", *flags, *data, "--set", "training.max_steps=1").exit_code == 0
    evaluated = run("evaluate", tmp_path / "out", *data, "--dense", "--json", tmp_path / "f.json")
    assert evaluated.exit_code == 0, evaluated.output + repr(evaluated.exception)
    assert json.loads((tmp_path / "f.json").read_text())["metric"] == "accuracy"
    assert run("evaluate", tmp_path / "out", *data, "--dense", "--task", "poem").exit_code != 0


def test_encoder_for_language_modelling(folder, tmp_path):
    build("bert").save_pretrained(tmp_path / "bert")
    words = ("--model", tmp_path / "bert")
    assert "is an encoder: it sees the tokens" in fails(*train_words(folder, tmp_path / "x", *words))


@pytest.mark.parametrize("content", [b"\xe9\xff", b"[1, 2]", b"no JSON"])
def test_init_from_a_config_that_is_none(folder, tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    words = ("--data", folder / "text.txt", "--out", tmp_path / "out")
    assert "c.json" in fails("init", "--config", tmp_path / "c.json", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize("command", ["init", "evaluate", "generate", "quickstart", "train", "sparsify"])
def test_seeds_that_no_generator_takes(tmp_path, command, seed):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    needed = {
        "init": ("--config", "c.json", "--data", "text.txt", "--out", out),
        "evaluate": (out, "--data", "text.txt"),
        "generate": (out, "--prompt", "a"),
        "quickstart": ("--overwrite", "--out", out),
    }
    words = needed.get(command, ("--model", "m", "--task", "lm", "--data", "text.txt", "--overwrite", "--out", out))
    assert "seed" in fails(command, *words, "--seed", seed)
    assert (out / "kept").exists()


def test_seeds_of_the_library(tmp_path):
    with pytest.raises(ConfigError, match="seed=-1 must be from 0 to 4294967295"):
        create(CONFIG, "text.txt", tmp_path / "out", seed=-1)


def test_a_new_model_is_not_made_where_a_file_is(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    words = ("init", "--config", folder / "dense" / "config.json", "--data", folder / "text.txt", "--vocab-size", 300)
    assert "is a file" in fails(*words, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_init_from_a_real_config(folder, tmp_path):
    config = folder / "dense" / "config.json"
    assert run("init", "--config", config, "--data", folder / "text.txt", "--out", tmp_path / "a").exit_code == 0
    for change, message in (
        ({"model_type": "poem"}, "is not one transformers knows"),
        ({"hidden_size": 30}, "cannot be"),
    ):
        (tmp_path / "c.json").write_text(json.dumps({**CONFIG, **change}))
        words = ("init", "--config", tmp_path / "c.json", "--data", folder / "text.txt", "--out", tmp_path / "b")
        assert message in fails(*words)


def test_train_on_a_sparse_model(folder, trained, tmp_path):
    assert "is sparse already" in fails(*train_words(folder, tmp_path / "x", "--model", trained))


def test_error_is_one_line_and_exit_code_2(folder, tmp_path):
    """Through the real entry point: no traceback, nothing on stdout."""
    for words in (
        ["evaluate", str(folder / "dense"), "--data", str(folder / "text.txt")],
        ["inspect", str(tmp_path / "nowhere" / "model")],
    ):
        process = subprocess.run(
            [sys.executable, "-c", "from lte.cli import main; main()", *words], capture_output=True, text=True
        )
        assert process.returncode == 2
        assert process.stdout == ""
        assert process.stderr.startswith("error: ")
        assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            RuntimeError("of some\nlibrary"),
            1,
            r"error: RuntimeError: of some library; the traceback is in (\S+), ",
        ),
        (OSError(5, "Input/output error", "out/x"), 2, r"error: Input/output error: out/x$"),
        (OSError(28, "No space left on device", "out/x"), 2, r"error: there is no space left to write to; .*: out/x$"),
        (MemoryError(), 1, r"error: out of memory; try a smaller batch"),
        (KeyboardInterrupt(), 130, r"interrupted$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_goes_wrong_is_one_line(error, code, said, monkeypatch, capsys):
    def fail(path):
        raise error

    monkeypatch.setattr("lte.inspect.inspect_checkpoint", fail)  # inside of a command, through typer
    monkeypatch.setattr("sys.argv", ["lte", "inspect", "x"])
    with pytest.raises(SystemExit) as left:
        lte_start.main()
    assert left.value.code == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    found = re.search(said, printed.err)
    assert found, printed.err
    if found.groups():
        log = Path(found[1]).read_text()
        assert log.startswith("lte inspect x\n")
        assert "Traceback" in log
        Path(found[1]).unlink()
        monkeypatch.setattr("sys.argv", ["lte", "inspect", "x", "--debug"])
        with pytest.raises(type(error)):
            lte_start.main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("inspect", "x", "--nope"), "error: No such option: --nope; see lte inspect --help\n"),
        (("nosuch",), "error: No such command 'nosuch'; see lte --help\n"),
        (("generate", "x"), "error: Missing option '--prompt'; see lte generate --help\n"),
    ],
)
def test_mistakes_on_the_line_are_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lte", *words])
    with pytest.raises(SystemExit) as left:
        lte_start.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == said


def test_a_traceback_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    def fail(path):
        raise RuntimeError("\udcff")

    monkeypatch.setattr("lte.inspect.inspect_checkpoint", fail)
    monkeypatch.setattr("sys.argv", ["lte", "inspect", "\udcff"])

    def no_room(**_):
        raise PermissionError(13, "Permission denied")

    for writable in (True, False):
        if not writable:
            monkeypatch.setattr("tempfile.mkstemp", no_room)
        with pytest.raises(SystemExit) as left:
            lte_start.main()
        assert left.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_while_modules_are_imported_is_one_line():
    code = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from lte_start import main
main()
"""
    process = subprocess.run([sys.executable, "-c", code, "methods"], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_sigterm_saves_a_checkpoint_from_which_the_run_ends_as_it_would_have(command, folder, tmp_path, monkeypatch):
    def words(out, *more):
        if command == "train":
            return [*train_words(folder, out, *more), "--seed", 3]
        of = (
            "--model",
            folder / "dense",
            "--data",
            folder / "text.txt",
            "--out",
            out,
            "--task",
            "lm",
            "--context-length",
            16,
        )
        return ["finetune", *of, "--batch-size", 4, "--set", "training.max_steps=5", *more]

    assert run(*words(tmp_path / "whole")).exit_code == 0
    on_log, before = JsonLinesLog.on_log, signal.getsignal(signal.SIGTERM)

    def stop(self, args, state, control, **kwargs):
        on_log(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(JsonLinesLog, "on_log", stop)
        stopped = run(*words(tmp_path / "cut"))
    assert stopped.exit_code == 143, stopped.output + repr(stopped.exception)
    assert f"stopped by SIGTERM; a checkpoint is in {tmp_path / 'cut' / 'checkpoints'}: the same" in stopped.output
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "cut" / "lte_run.json").exists()
    assert last_complete_checkpoint(tmp_path / "cut" / "checkpoints").name in ("checkpoint-2", "checkpoint-3")
    result = run(*words(tmp_path / "cut", "--resume"))
    assert result.exit_code == 0, result.output + repr(result.exception)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_sigterm_before_anything_is_trained_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lte.runs.load_tokenizer", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    result = run(*train_words(folder, tmp_path / "out"))
    assert result.exit_code == 143
    assert "stopped by SIGTERM; nothing was trained yet: run the same command again" in result.output
