"""Benchmarks: what their rows hold, that a wrong result has no time, and the speed model."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import lte
from lte import KLAConfig, LTEConfig, SelfPredictionConfig
from lte.bench import checks, decode
from lte.bench.decode import bench_decode, generate_seconds, time_beside
from lte.bench.ffn import bench_ffn
from lte.bench.limit import bench_limit, decode_bytes
from lte.bench.shapes import SHAPES, leave_out, model_config, random_model
from lte.cli import app
from lte.errors import ConfigError
from lte.families import blocks_of
from lte.nn import SparsityMeter, observe_routing, sparse_ffns
from lte.ops import cpu
from tests import models

KEYS = {
    "d_model",
    "d_ff",
    "dtype",
    "tokens",
    "sparsity",
    "dense_ms",
    "sparse_ms",
    "speedup",
    "gbytes_per_s",
    "limit_gbytes_per_s",
    "max_error",
    "backend",
    "threads",
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("lte.bench.ffn.DISTINCT_BYTES", 1 << 18)
    return {"d_model": 64, "d_ff": 128, "rounds": 3}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("router", "expert_size"), [("linear", 32), ("copy", 1), ("copy", 32), ("mask", 1)])
def test_ffn_rows(small, dtype, router, expert_size):
    rows, crossover = bench_ffn(
        dtype=dtype, sparsities=(0, 0.5), tokens=(1, 3), router=router, expert_size=expert_size, **small
    )
    assert len(rows) == 4
    assert (rows[1]["router_bytes"] > 0) == (router != "mask")
    for row in rows:
        assert set(row) >= KEYS | {"bytes_moved", "share_of_limit", "baseline", "status"}
        assert row["status"] == "ok"
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"], rel=1e-6)
        assert row["gbytes_per_s"] == pytest.approx(row["bytes_moved"] / row["sparse_ms"] / 1e6, rel=1e-3)
    assert rows[0]["sparsity"] == 0
    assert 0.2 < rows[1]["sparsity"] < 0.8
    assert (crossover is None) == bool(cpu.unavailable())


@pytest.mark.parametrize("bits", [4, 8])
def test_ffn_rows_of_few_bits(small, bits):
    rows, crossover = bench_ffn(dtype="bf16", weights=bits, sparsities=(0, 0.5), tokens=(1, 3), **small)
    assert [row["weights"] for row in rows] == [f"int{bits}"] * 4
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert crossover is None
    assert rows[0]["bytes_moved"] == 3 * 64 * 128 * (bits + 0.5) / 8


def test_without_the_kernels_the_reference_is_measured(small, monkeypatch):
    from lte.ops import backends
    from lte.ops.cpu import library

    backends.obstacle.cache_clear()
    monkeypatch.setattr(library, "_open", lambda: (None, "the C++ kernels were not built"))
    try:
        rows, crossover = bench_ffn(dtype="fp32", sparsities=(0.5,), **small)
    finally:
        backends.obstacle.cache_clear()
    assert crossover is None
    assert rows[0]["backend"] == "reference (dense)"
    assert rows[0]["status"] == "ok"


@pytest.mark.skipif(bool(cpu.unavailable()), reason="the kernels are not built")
def test_a_wrong_result_is_reported_as_failed_and_has_no_time(small, monkeypatch):
    monkeypatch.setattr("lte.ops.operator.cpu.sparse_ffn", lambda x, *_: x)
    rows, _ = bench_ffn(dtype="fp32", sparsities=(0.5,), impl="cpu", **small)
    assert rows[0]["status"].startswith("failed: error")
    assert not {"dense_ms", "sparse_ms", "speedup"} & set(rows[0])


def test_decode_of_a_fixed_share_needs_a_model():
    with pytest.raises(
        ConfigError, match="method='kla' cannot be timed on random weights.*lte sparsify, and give --model"
    ):
        bench_decode(dtype="fp32", method=KLAConfig())


@pytest.mark.parametrize("method", [LTEConfig(), SelfPredictionConfig()], ids=["lte", "self-prediction"])
def test_decode_rows(tmp_path, method):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    rows, _ = bench_decode(
        config_name=str(config),
        dtype="fp32",
        sparsities=(0.0, 0.5),
        new_tokens=4,
        method=method,
        rounds=1,
        compiled=False,
        with_llama_cpp=False,
    )
    assert [row["engine"] for row in rows] == ["transformers", "lte", "lte"]
    for row in rows:
        assert row["status"] == "ok", row
        assert set(row) >= KEYS | {"engine", "ms_per_token", "version"}
    assert rows[2]["max_error"] < 1e-5
    assert rows[1]["sparsity"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_decode_rows_of_few_bits(tmp_path, dtype):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    rows, _ = bench_decode(
        config_name=str(config),
        dtype=dtype,
        sparsities=(0.0, 0.5),
        new_tokens=4,
        weights=(8, 4),
        rounds=1,
        compiled=False,
        with_llama_cpp=False,
    )
    assert [row["weights"] for row in rows] == [dtype] * 3 + ["int8"] * 2 + ["int4"] * 2
    for row in rows:
        assert row["status"] == "ok", row
    # One cache and one router beside weights of 4.5, 8.5 and 16 or 32 bits.
    moved = [row["bytes_moved"] for row in rows]
    assert moved[1] > moved[3] > moved[5] > moved[6]
    with pytest.raises(ConfigError, match="lte quantize"):
        bench_decode(model_folder=str(tmp_path), weights=(4,))


def test_decode_rows_of_few_bits_alone(tmp_path, monkeypatch):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    shapes = []
    monkeypatch.setattr(
        "lte.bench.decode.random_model", lambda *args, **of: shapes.append(of) or random_model(*args, **of)
    )
    words = [
        "bench",
        "decode",
        "--config",
        str(config),
        "--weights",
        "int4",
        "--sparsity",
        "0,0.5",
        "--new-tokens",
        "4",
    ]
    done = CliRunner().invoke(app, [*words, "--rounds", "1", "--no-llama-cpp", "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["engine"], row["weights"]) for row in rows] == [("lte", "int4")] * 2
    assert [of["weights"].bits for of in shapes] == [4]  # no other copy of the shape was made
    for row in rows:
        assert row["status"] == "ok"
        assert row["ms_per_token"] > 0
        assert row["first_token_s"] > 0
        assert row["peak_gb"] > row["weights_gb"] > 0
    with pytest.raises(ConfigError, match="no weights to time"):
        bench_decode(config_name=str(config), plain=False)


def test_llama_cpp_is_left_out_in_words(tmp_path, monkeypatch):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    monkeypatch.setattr("lte.bench.llama_cpp.find_spec", lambda name: None)
    rows, _ = bench_decode(
        config_name=str(config), dtype="fp32", sparsities=(0.5,), new_tokens=2, rounds=1, compiled=False
    )
    assert rows[-1]["engine"] == "llama.cpp"
    assert rows[-1]["status"] == "left out: not installed: pip install llama-cpp-python gguf"
    assert "ms_per_token" not in rows[-1]


@pytest.mark.parametrize("sparsity", [0.25, 0.8])
def test_random_routers_reach_the_sparsity_asked_for(tmp_path, sparsity):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    model = random_model(model_config(str(config)), torch.float32, torch.device("cpu"), LTEConfig(expert_size=8))
    ids = torch.randint(1, 96, (1, 200))
    with torch.no_grad():
        leave_out(model, sparsity, ids)
        meter = SparsityMeter(len(sparse_ffns(model)))
        meter.set_token_mask(torch.ones_like(ids, dtype=torch.bool))
        with observe_routing(model, meter):
            model(ids)
    assert meter.overall == pytest.approx(sparsity, abs=0.01)


def test_the_speed_model_knows_the_published_ceiling():
    """LLaMA-2-7B: 6.61 G weights are read per token, 4.33 G of them the FFN's; half of those left out gives 1.49x."""
    count = decode_bytes(model_config("llama-2-7b"))
    assert count.dense == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096)
    assert count.speedup(0.5, router=False) == pytest.approx(1.487, abs=0.001)
    assert count.speedup(0.5) == pytest.approx(1.457, abs=0.001)  # routers are float32
    assert count.speedup(0.0) < 1
    longer = decode_bytes(model_config("llama-2-7b"), context=4096)
    assert longer.cache == 2 * 32 * 2 * 4096 * 4096
    assert longer.speedup(0.8) < count.speedup(0.8)


def test_every_known_shape_can_be_counted():
    rows = bench_limit()
    assert {row["config"] for row in rows} == set(SHAPES)
    assert all(1 < row["limit_speedup"] < row["limit_speedup_without_router"] < 5 for row in rows)
    assert all(
        row["limit_speedup_without_router"] <= 1 / (1 - row["ffn_share"] * row["sparsity"]) + 1e-9 for row in rows
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": (1.0,)}, "sparsity=1.0 is out of range"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; choose one of fp32, bf16, fp16"),
        ({"d_ff": 100}, "d_ff=100 is not divisible by expert_size=32"),
        ({"tokens": (0,)}, "tokens=0 is out of range"),
        ({"weights": 9}, "weights of 9 bits are unknown; choose from 1 to 8"),
        ({"weights": 4, "expert_size": 16}, "expert_size=16: experts of few bits have a multiple of 32 neurons"),
        ({"weights": 4, "tokens": (65,)}, "tokens=65: weights of few bits are written out for more than 64"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ConfigError, match=message):
        bench_ffn(**arguments)


def test_the_command_line(tmp_path):
    runner = CliRunner()
    file = tmp_path / "limit.json"
    result = runner.invoke(
        app, ["bench", "limit", "--config", "llama-2-7b", "--sparsity", "0.5,0.8", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "llama-2-7b" in result.output
    assert [row["sparsity"] for row in json.loads(file.read_text())["rows"]] == [0.5, 0.8]
    result = runner.invoke(app, ["bench", "limit", "--config", "llama-9"])
    assert isinstance(result.exception, ConfigError)
    assert "llama-1.2b" in str(result.exception)
    result = runner.invoke(app, ["bench", "ffn", "--sparsity", "half"])
    assert "is no list of numbers" in str(result.exception)


def test_the_prompt_and_the_first_token_are_no_part_of_a_time(monkeypatch):
    now = iter((0.0, 5.0, 6.0, 8.0, 9.0))
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(now))
    assert generate_seconds(models.build("llama"), models.inputs(2, 4)["input_ids"], 3) == 1.0


def test_a_dense_model_is_timed_through_the_kernels_beside_its_sparse_one():
    stock = models.build("llama").to(torch.bfloat16)
    ids = models.inputs(1, 20)["input_ids"]
    with torch.no_grad():
        wanted = stock(ids).logits
        times = time_beside(None, stock, ids, 2)
        assert times.keys() == {"dense_ms_per_token", "kernels_dense_ms_per_token", "dtype"}
        torch.testing.assert_close(stock(ids).logits, wanted)  # it is left as it was
    sparse = lte.sparsify(models.build("llama"), lte.KLAConfig(sparsity=0.5)).to(torch.bfloat16)
    times = time_beside(sparse, stock, ids, 2)
    assert times["ms_per_token"] > 0
    assert times["path"] in ("fused step, PyTorch decides", "masked dense")
    pruned = lte.sparsify(models.build("llama"), lte.PruneMagnitudeConfig(sparsity=0.5)).to(torch.bfloat16)
    assert time_beside(pruned, stock, ids, 2)["path"] in ("fused step", "masked dense")


def test_logits_may_differ_by_what_rounding_does_and_no_more(tmp_path, monkeypatch):
    models.build("llama").config.save_pretrained(tmp_path)
    config = model_config(str(tmp_path / "config.json"))
    model = random_model(config, torch.bfloat16, torch.device("cpu"), LTEConfig(expert_size=8))
    lte.prepare_for_inference(model)
    ids = torch.randint(1, config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = checks.check_logits(model, ids, 4)
        assert 0 < found.noise < 0.1
        assert found.error <= found.allowed == max(checks.LOGITS_TOLERANCE[torch.bfloat16], checks.SLACK * found.noise)
        before = {name: p.clone() for name, p in model.named_parameters()}
        assert not any(block._forward_hooks for block in blocks_of(model))
        # A fast path that is wrong: it runs on other weights than the slow one.
        step = model.forward
        real = model.generate

        def on_other_weights(*args, **kwargs):
            model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
            out = real(*args, **kwargs)
            model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
            return out

        monkeypatch.setattr(model, "generate", on_other_weights)
        wrong = checks.check_logits(model, ids, 4)
    assert wrong.error > 2 * wrong.allowed
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.forward is step
