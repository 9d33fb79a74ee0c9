"""Ours beside llama.cpp's formats: the file that is written for it, and the rows."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

import lte
from lte.bench import llama_cpp
from lte.bench.front import Width, bench_front
from lte.bench.gguf_file import write_llama
from lte.cli import app
from lte.errors import ConfigError, LTEError
from lte.models import train_tokenizer
from lte.tasks import TaskConfig, build_task
from tests import models
from tests.test_planes import wide

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


@needs_gguf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_written_for_llama_cpp_is_read_back(dtype, tmp_path):
    model = models.build("llama").to(dtype)
    model.config.rope_parameters["rope_theta"] = 5e5
    write_llama(tmp_path / "x.gguf", model.config, dtype, model)
    loaded = lte.load_dense(tmp_path / "x.gguf", dtype=dtype)
    assert loaded.config.rope_parameters["rope_theta"] == 5e5
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@needs_gguf
def test_models_llama_cpp_would_not_run_right_are_refused(tmp_path):
    model = models.build("llama-bias-relu")
    with pytest.raises(LTEError, match=r"no file is written for a model with biases \(model\.layers\.0"):
        write_llama(tmp_path / "x.gguf", model.config, torch.float32, model)
    model = models.build("llama")
    model.config.rope_parameters["rope_type"] = "linear"
    with pytest.raises(LTEError, match="rope_type='linear'"):
        write_llama(tmp_path / "y.gguf", model.config, torch.float32, model)


def test_widths():
    assert Width.parse("int4@3.2") == Width(4, 3.2)
    assert Width.parse("int8").name == "int8"
    for wrong in ("4", "int9", "int4@", "fp4"):
        with pytest.raises(ConfigError, match=f"'{wrong}' is no width"):
            Width.parse(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("front")
    (path / "text.txt").write_text("A small text, of some words and few lines, that is read again and again.\n" * 80)
    model = wide()
    model.resize_token_embeddings(300)
    model.save_pretrained(path / "dense")
    train_tokenizer([(path / "text.txt").read_text()], 300).save_pretrained(path / "dense")
    return path


def test_rows(folder):
    task, text = build_task(TaskConfig(name="lm", context_length=80)), str(folder / "text.txt")
    settings = {"tokens": 160, "eval_tokens": 160, "new_tokens": 2, "rounds": 1, "steps": 2, "head_bits": None}
    widths = [Width(8, None), Width(4, None), Width(4, 3.2)]
    rows = bench_front(str(folder / "dense"), text, text, task, ours=widths, formats=["Q8_0"], **settings)
    ours, theirs = [row for row in rows if row["engine"] == "lte"], [row for row in rows if row["engine"] != "lte"]
    assert [(row["weights"], row["steps"]) for row in ours] == [
        ("bf16", 0), *[(width.name, steps) for width in widths for steps in (0, 2)]
    ]  # fmt: skip
    by = {(row["weights"], row["steps"]): row for row in ours}
    assert all(row["status"] == "ok" and row["ms_per_token"] > 0 for row in ours)
    assert by["bf16", 0]["bits_per_weight"] == pytest.approx(16)
    assert 8 < by["int8", 0]["bits_per_weight"] < 9
    assert by["int4@3.2", 0]["bits_per_weight"] < by["int4", 0]["bits_per_weight"] < 5
    assert by["bf16", 0]["kl_divergence"] < by["int8", 0]["kl_divergence"] < by["int4", 0]["kl_divergence"]
    assert by["bf16", 0]["same_top"] > 0.95
    assert by["int4", 0]["above_dense"] == pytest.approx(by["int4", 0]["loss"] - by["bf16", 0]["loss"])
    assert [row["weights"] for row in theirs] == ["bf16", "Q8_0"]
    if llama_cpp.missing():
        assert all(row["status"].startswith("left out: not installed") for row in theirs)
    else:
        assert all(row["kl_divergence"] < 0.01 for row in theirs)


def test_the_command(folder):
    text = str(folder / "text.txt")
    words = ["bench", "front", str(folder / "dense"), "--data", text, "--eval-data", text, "--context-length", "32"]
    small = ["--tokens", "64", "--eval-tokens", "64", "--new-tokens", "2", "--rounds", "1", "--formats", ""]
    result = CliRunner().invoke(app, [*words, *small, "--ours", "int6", "--json", str(folder / "f.json")])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert [row["weights"] for row in json.loads((folder / "f.json").read_text())["rows"]] == ["bf16", "int6"]
    some = ["--ours", "int6,int4", "--steps", "1", "--steps-for", "int4", "--json", str(folder / "g.json")]
    result = CliRunner().invoke(app, [*words, *small, *some])
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = [(row["weights"], row["steps"]) for row in json.loads((folder / "g.json").read_text())["rows"]]
    assert found == [("bf16", 0), ("int6", 0), ("int4", 0), ("int4", 1)]
    some[some.index("--steps-for") + 1] = "int5"
    assert "int5 is to be trained" in str(CliRunner().invoke(app, [*words, *small, *some]).exception)
    result = CliRunner().invoke(app, [*words, *small, "--ours", "int6", "--context-length", "100000"])
    assert "less text than one window" in str(result.exception) or "context" in str(result.exception)
    assert "is no width" in str(CliRunner().invoke(app, [*words, *small, "--ours", "int66"]).exception)
