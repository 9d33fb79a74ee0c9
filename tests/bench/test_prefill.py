"""Prompts side by side: what the rows hold."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lte.bench import llama_cpp, prefill
from lte.bench.prefill import bench_prefill
from lte.cli import app
from lte.config import method_config
from lte.errors import ConfigError
from tests.bench.test_bench import TINY


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return str(file)


@pytest.mark.parametrize("method", ["lte", "self-prediction"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows(config, method, dtype):
    settings = {"expert_size": 8} if method == "lte" else {}
    rows, _ = bench_prefill(
        config_name=config,
        dtype=dtype,
        tokens=(2, 80),
        sparsities=(0.0, 0.5),
        rounds=1,
        method=method_config(method, settings),
    )
    assert [(row["tokens"], row["engine"]) for row in rows] == [
        (count, engine) for count in (2, 80) for engine in ("transformers", "lte", "lte", "llama.cpp")
    ]
    for row in rows:
        if row["engine"] == "llama.cpp" and llama_cpp.missing():
            assert row["status"].startswith("left out: not installed")
            continue
        assert row["status"] == "ok", row
        assert row["ms"] > 0
    assert rows[4]["speedup"] == 1.0
    assert rows[5]["sparsity"] == 0
    if method == "lte":
        assert rows[6]["sparsity"] == pytest.approx(0.5, abs=0.1)
    else:
        assert (rows[6]["sparsity"], rows[6]["backend"]) == (0, "all neurons")


def test_a_wrong_result_has_no_time(config, monkeypatch):
    monkeypatch.setattr(prefill, "ffn_error", lambda *_: 1.0)
    rows, _ = bench_prefill(config_name=config, tokens=(4,), sparsities=(0.5,), rounds=1, with_llama_cpp=False)
    assert rows[1]["status"] == "failed: FFN error 1 above 0.016"
    assert "ms" not in rows[1]


def test_the_command(config, tmp_path):
    words = ["bench", "prefill", "--config", config, "--tokens", "3", "--sparsity", "0.5", "--rounds", "1"]
    result = CliRunner().invoke(app, [*words, "--no-llama-cpp", "--json", str(tmp_path / "p.json")])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert [row["engine"] for row in json.loads((tmp_path / "p.json").read_text())["rows"]] == ["transformers", "lte"]
    for wrong, message in (
        ({"tokens": (1,)}, "tokens=\\[1\\], rounds=3: at least 2 and 1"),
        ({"dtype": "x"}, "'x'"),
        ({"sparsities": (float("nan"),)}, "sparsity=nan is out"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench_prefill(config_name=config, **wrong)
