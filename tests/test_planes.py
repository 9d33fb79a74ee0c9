"""Weights in two planes: a model of single neurons, quantised; thresholds for some bits per token."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lte
from lte.accounting import model_cost
from lte.bench.decode import bench_decode
from lte.bench.shapes import random_model
from lte.cli import app
from lte.config import method_config
from lte.errors import CheckpointError, ConfigError
from lte.models import train_tokenizer
from lte.nn import LearnedPlanes, NestedDown, NestedLinear, sparse_ffns
from lte.ops import cpu, few_bits
from lte.ops.nested import nested_ffn_reference
from lte.planes import weights_config
from tests import models
from tests.test_quantization import check_decode_step, logits, off

FAMILIES = ["llama", "llama-bias-relu", "qwen2", "gemma"]


def batches():
    return [{**models.inputs(8, 16), "labels": models.inputs(8, 16)["input_ids"]}]


def wide(family="llama"):
    """As wide as a group, so that nothing is filled up."""
    config = copy.deepcopy(models.CONFIGS[family])
    config.hidden_size, config.head_dim = 64, 16
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def by_neuron(family="llama"):
    model = lte.sparsify(wide(family), method_config("self-prediction", {}), calibration=batches())
    lte.calibrate(model, batches(), 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_single_neurons_comes_back_from_disk(family, tmp_path):
    model = by_neuron(family)
    wanted = logits(model)
    lte.quantize(model, bits=8, calibration=batches())
    assert {NestedLinear, NestedDown} <= {type(module) for module in model.modules()}
    assert off(logits(model), wanted) < 0.15  # the upper four bits pick other neurons than three of a copy's own
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.quantization_config.weights.coarse == 4


@pytest.mark.parametrize("bits", [2.6, 3.2, 4.0])
def test_a_token_reads_the_bits_asked_for(bits, tmp_path):
    model = lte.quantize(wide("llama"), bits=4, bits_per_token=bits, calibration=batches())
    ffns, read = sparse_ffns(model), []

    def count(layer, routing):
        router = ffns[layer].router
        form = router.form()
        fine = (routing.margins + router.cut > router.fine) & routing.mask
        read.append(form.weights.bits_read(float(routing.mask.float().mean()), float(fine.float().mean())))

    with torch.no_grad(), lte.nn.observe_routing(model, count):
        model(**models.inputs(8, 16))
    assert sum(read) / len(read) == pytest.approx(bits, abs=0.05)
    router = ffns[0].router
    assert 0 <= router.fine_share <= 1
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path)
    assert [ffn.router.fine for ffn in sparse_ffns(loaded)] == [router.fine] * len(ffns)
    assert torch.equal(logits(loaded), logits(model))
    # Bytes are those bits, of the FFNs.
    layer = model_cost(model).layers[0]
    assert layer.spared == pytest.approx((1 - router.fine_share) * layer.ffn * 1 / 8, rel=0.01)


@pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_is_one_call(family, batch, dtype, monkeypatch):
    plain = lte.quantize(wide(family), bits=4, bits_per_token=3.2, calibration=batches()).to(dtype)
    check_decode_step(plain, batch, dtype, monkeypatch)


@pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")
@pytest.mark.parametrize("batch", [1, 4])
def test_generated_tokens_are_the_references(batch, monkeypatch):
    model = lte.quantize(wide("llama"), bits=4, bits_per_token=3.2, calibration=batches())
    fast = lte.prepare_for_inference(copy.deepcopy(model))
    prompt = models.inputs(batch, 9)
    prompt["attention_mask"][1:, :4] = 0
    found = fast.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    monkeypatch.setenv("LTE_BACKEND", "reference")
    assert torch.equal(found, model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0))


def test_the_dial_still_turns():
    model = lte.quantize(by_neuron(), bits=4)
    found = [lte.calibrate(model, batches(), sparsity).sparsity for sparsity in (0.25, 0.75)]
    assert found == pytest.approx([0.25, 0.75], abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "bits_per_token": 3.2}, "needs calibration data"),
        ({"bits": 4, "bits_per_token": 1.0, "calibration": True}, "out of reach with 4 bits, 3 of them"),
        ({"bits": 4, "bits_per_token": 5.0, "calibration": True}, "from 2.17 to 4.25"),
        ({"bits": 8, "coarse": 3, "bits_per_token": 4.0, "calibration": True}, "from 0 to 4 others must be left"),
        ({"bits": 4, "group": 32, "bits_per_token": 3.2, "calibration": True}, "must be a multiple of 64"),
    ],
)
def test_what_cannot_be(settings, message):
    settings = {**settings, "calibration": batches() if settings.get("calibration") else None}
    with pytest.raises(ConfigError, match=message):
        lte.quantize(wide("llama"), **settings)


def test_experts_take_no_bits_per_token():
    model = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=32, grouping="random", router_init="random"))
    with pytest.raises(ConfigError, match="method self-prediction"):
        lte.quantize(model, bits=4, bits_per_token=3.2, calibration=batches())


def test_damaged_checkpoints(tmp_path):
    lte.quantize(wide(), bits=4, bits_per_token=3.2, calibration=batches()).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, text = load_file(file), config.read_text()

    def refused(match, *, without="", **weights):
        save_file({k: v for k, v in tensors.items() if k != without}, file, metadata={"format": "pt"})
        values = json.loads(text)
        values["quantization_config"]["weights"] |= weights
        config.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=match) as error:
            lte.load(tmp_path)
        assert "\n" not in str(error.value)

    refused("lacks FFN weights: layers.1.mlp.down_proj.lower", without="model.layers.1.mlp.down_proj.lower")
    refused("lacks FFN weights: layers.0.mlp.gate_proj.codes", without="model.layers.0.mlp.gate_proj.codes")
    refused("has shape", coarse=2)
    refused("has shape", bits=5)
    refused("has shape", group=128)
    refused("coarse is missing", coarse=None)
    refused("lacks routers: layers.1.mlp.router._extra_state", without="model.layers.1.mlp.router._extra_state")


def test_the_command(tmp_path):
    text, folder = tmp_path / "text.txt", tmp_path / "dense"
    text.write_text("A small text, of some words and few lines, that is read again and again.\n" * 60)
    model = wide()
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    train_tokenizer([text.read_text()], 300).save_pretrained(folder)
    words = ["quantize", str(folder), "--weights", "int4", "--bits-per-token", "3.2", "--context-length", "16"]
    result = CliRunner().invoke(app, [*words, "--data", str(text), "--out", str(tmp_path / "small")])
    assert result.exit_code == 0, result.output + repr(result.exception)
    loaded = lte.load(tmp_path / "small")
    assert loaded.config.quantization_config.method.method == "self-prediction"
    assert loaded.config.quantization_config.weights.coarse == 3
    result = CliRunner().invoke(app, [*words, "--coarse", "2", "--data", str(text), "--out", str(tmp_path / "two")])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert lte.load(tmp_path / "two").config.quantization_config.weights.coarse == 2
    more = ["--data", str(text), "--steps", "2", "--out", str(tmp_path / "tuned")]
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert len(json.loads((tmp_path / "tuned" / "lte_quantize.json").read_text())["losses"]) == 2
    assert len(lte.load(tmp_path / "tuned").config.quantization_config.operating_points) == 1
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "other")])
    assert "needs calibration data" in str(result.exception)
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")
def test_decoding_is_timed_at_some_bits(tmp_path):
    wide().config.to_json_file(tmp_path / "config.json")
    settings = {"compiled": False, "with_llama_cpp": False, "new_tokens": 3, "rounds": 1}
    method = method_config("self-prediction", {})
    of = {"weights": [4], "bits_per_token": [3.2], "sparsities": [0.5], "method": method}
    rows, _ = bench_decode(config_name=str(tmp_path / "config.json"), **of, **settings)
    assert [row["weights"] for row in rows if row["engine"] == "lte"] == ["bf16", "int4", "int4 at 3.2"]
    assert not [row["status"] for row in rows if row["status"].startswith("failed")]
    with pytest.raises(ConfigError, match="--method self-prediction and --weights"):
        bench_decode(bits_per_token=[3.2])


@pytest.mark.parametrize(("bits", "coarse", "made"), [(3, None, 3), (4, None, 4), (5, None, 4), (6, 3, 3), (4, 2, 2)])
def test_planes_of_other_bits_come_back_from_disk(bits, coarse, made, tmp_path):
    model = lte.quantize(by_neuron(), bits=bits, coarse=coarse)
    weights = model.config.quantization_config.weights
    assert (weights.bits, weights.coarse) == (bits, made)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(lte.load(tmp_path)), logits(model))


def test_a_random_model_in_two_planes_has_memory_behind_all_of_it():
    method = method_config("self-prediction", {})
    weights = weights_config(4, by_neuron=True)
    model = random_model(wide().config, torch.float32, torch.device("cpu"), method, weights=weights)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("family", ["llama", "llama-bias-relu"])
def test_scales_of_two_planes_are_learned(family, tmp_path, monkeypatch):
    teacher, text = wide(family), [models.inputs(8, 40, seed=seed) for seed in range(4)]
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that it predicts something
    model = lte.quantize(copy.deepcopy(teacher), bits=4, bits_per_token=3.2, calibration=text).eval()
    held = models.inputs(4, 40, seed=9)
    wanted = logits(teacher, held).log_softmax(-1)

    def divergence():
        return float((wanted.exp() * (wanted - logits(model, held).log_softmax(-1))).sum(-1).mean())

    before, ffn = divergence(), sparse_ffns(model)[0]
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr("lte.ops.nested.as_taken", lambda x, group: x.float())
        form, x = ffn.router.form(), torch.randn(2, 3, 64)
        found = nested_ffn_reference(x.flatten(0, 1), form.weights, form.cut, form.fine_cut).view(x.shape)
        torch.testing.assert_close(LearnedPlanes(ffn)(x), found)
    exact, exact_rows = ffn.down_proj.exact.clone(), ffn.down_proj.exact_rows.clone()
    lte.tune_quantized(model, teacher, text, 16, learning_rate=3e-3)
    assert divergence() < (0.97 if family == "llama" else 1.1) * before
    assert torch.equal(ffn.down_proj.exact, exact)
    assert torch.equal(ffn.down_proj.exact_rows, exact_rows)
    assert "forward" not in ffn.__dict__
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(lte.load(tmp_path), held), logits(model, held))


def test_the_gradient_of_a_scale_is_that_of_both_planes():
    model = lte.quantize(wide(), bits=4, bits_per_token=3.2, calibration=batches())
    learned = LearnedPlanes(sparse_ffns(model)[0])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    learned(x).square().sum().backward()
    for factors in learned.parameters():
        row = int(factors.grad[:, 0].abs().argmax())
        with torch.no_grad():
            values = []
            for step in (-1e-3, 1e-3):
                factors[row, 0] += step
                values.append(float(learned(x).square().sum()))
                factors[row, 0] -= step
        assert float(factors.grad[row, 0]) == pytest.approx((values[1] - values[0]) / 2e-3, rel=0.02)


def test_a_compiled_ffn_is_one_operator_where_kernels_take_it(monkeypatch):
    """As on a GPU, whose operator stands in for the reference here."""
    ffn = sparse_ffns(lte.quantize(by_neuron(), bits=8, calibration=batches()))[0]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv("LTE_BACKEND", "reference")
    with torch.no_grad(), torch.library._scoped_library("lte", "IMPL") as library:
        wanted = ffn(x)
        library.impl("nested_ffn", few_bits._on_gpu_nested, "CPU")
        taken = []

        def operate(x_TD, weights, *cuts):
            taken.append(len(x_TD))
            return torch.ops.lte.nested_ffn(x_TD, *few_bits._flat_planes(weights), *cuts)

        monkeypatch.setattr("lte.nn.ffn.nested_ffn", operate)
        torch.testing.assert_close(torch.compile(ffn, backend="eager", fullgraph=True)(x), wanted)
    assert taken
