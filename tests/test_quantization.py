"""Models of few bits: close to what they were, saved, loaded, and decoded by the kernels as the definition has it."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import lte
from lte.config import WeightsConfig
from lte.errors import CheckpointError, ConfigError
from lte.families import DECODERS
from lte.inference.decode import DecodeStep
from lte.nn import QuantizedEmbedding, QuantizedLinear, SparseFFN, TiedHead, sparse_ffns
from lte.ops import cpu
from lte.ops.lowbit import dequantize_rows, quantize
from lte.quantization import places, quantized_modules
from tests import models

FAMILIES = [name for name in models.CONFIGS if models.CONFIGS[name].model_type in DECODERS]


def sparse(family: str) -> torch.nn.Module:
    model = lte.sparsify(models.build(family), lte.LTEConfig(expert_size=32, grouping="random", router_init="random"))
    models.spread_routers(model)
    return model


def tie(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def logits(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or models.inputs(2, 9))).logits.float()


def off(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_comes_back_from_disk(family, tied, tmp_path):
    model = models.build(family)
    wanted = logits(tie(model) if tied else model)
    lte.quantize(model, bits=8)
    assert off(logits(model), wanted) < 0.05
    kinds = {type(module) for module in model.modules()}
    assert {QuantizedLinear, QuantizedEmbedding} <= kinds
    assert torch.nn.Linear not in kinds
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.quantization_config.weights == model.config.quantization_config.weights
    assert off(logits(lte.load(tmp_path, dtype=torch.bfloat16)), wanted) < 0.06  # codes and scales are not cast


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_fewer_bits_are_further_away_and_take_less(bits):
    model, wanted = models.build("llama"), logits(models.build("llama"))
    lte.quantize(model, bits=bits)
    assert off(logits(model), wanted) < {3: 0.9, 4: 0.5, 6: 0.13, 8: 0.05}[bits]
    for module in quantized_modules(model):
        rows = -(-module.rows // 16) * 16  # in whole blocks
        assert module.nbytes == (bits + 0.5) / 8 * rows * module.columns


def test_a_tied_head_is_saved_once(tmp_path):
    model = lte.quantize(tie(models.build("llama")), bits=4)
    assert isinstance(model.lm_head, TiedHead)
    assert not [key for key in model.state_dict() if key.startswith("lm_head")]
    other = copy.deepcopy(model)
    other.model.embed_tokens.codes.zero_()
    assert logits(other).std() != logits(model).std()  # the copy's head reads the copy's embeddings
    model.save_pretrained(tmp_path)
    assert lte.load(tmp_path).config.quantization_config.weights.tied


@pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made", ["dense", "sparse", "tied"])
def test_a_decode_step_is_one_call(made, family, batch, dtype, monkeypatch):
    model = sparse(family) if made == "sparse" else models.build(family)
    plain = lte.quantize(tie(model) if made == "tied" else model, bits=4).to(dtype)
    check_decode_step(plain, batch, dtype, monkeypatch)


def check_decode_step(plain, batch, dtype, monkeypatch):
    """One call into the kernels gives the logits of the definition, some tokens of the prompt being padding."""
    fast = lte.prepare_for_inference(copy.deepcopy(plain))
    assert isinstance(fast.__dict__["forward"], DecodeStep)
    prompt, token = models.inputs(batch, 9), models.inputs(batch, 1)["input_ids"]
    prompt["attention_mask"][1:, :4] = 0
    mask = torch.cat([prompt["attention_mask"], torch.ones(batch, 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        caches = [plain(**prompt, use_cache=True).past_key_values for _ in range(2)]
        monkeypatch.setenv("LTE_BACKEND", "reference")
        wanted = plain(input_ids=token, attention_mask=mask, past_key_values=caches[0]).logits.float()
        monkeypatch.delenv("LTE_BACKEND")
        monkeypatch.setattr(SparseFFN, "forward", lambda *_: pytest.fail("a step ran module by module"))
        found = fast(input_ids=token, attention_mask=mask, past_key_values=caches[1]).logits.float()
    assert off(found, wanted) < (0.01 if dtype == torch.float32 else 0.05)


def test_rows_of_a_matrix():
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    for bits in (1, 3, 4, 8):
        made, ids = quantize(weight, bits, 32), torch.tensor([[39, 0], [17, 17]])
        torch.testing.assert_close(dequantize_rows(made, ids, torch.float32), made.dequantize()[ids])


def test_gradients_pass_on_to_what_is_learned():
    model = lte.quantize(models.build("llama"), bits=4).train()
    inputs = models.inputs(2, 9)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_the_dial_still_turns():
    model = lte.quantize(sparse("llama"), bits=8)
    found = [lte.calibrate(model, [models.inputs(8, 16)], sparsity).sparsity for sparsity in (0.25, 0.75)]
    assert found[0] < 0.4
    assert found[1] > 0.6
    model.set_sparsity(0.25)


def test_what_cannot_be_quantised():
    with pytest.raises(ConfigError, match="of family 'gpt2' cannot be quantised"):
        lte.quantize(models.build("gpt2"), bits=4)
    with pytest.raises(ConfigError, match="of few bits already"):
        lte.quantize(lte.quantize(models.build("llama"), bits=8), bits=4)
    small = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    with pytest.raises(ConfigError, match="experts of 8 neurons cannot be of few bits in groups of 32"):
        lte.quantize(small, bits=4)
    assert not quantized_modules(small)
    assert list(places(small))
    for wrong in ({"bits": 9}, {"bits": 0}, {"bits": 4, "group": 48}):
        with pytest.raises(ConfigError, match="weights: "):
            lte.quantize(models.build("llama"), **wrong)
        with pytest.raises(ConfigError):
            WeightsConfig(**wrong)


def test_damaged_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    lte.quantize(sparse("llama"), bits=4).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, text = load_file(file), config.read_text()

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as error:
            lte.load(tmp_path)
        assert "\n" not in str(error.value)
        save_file(tensors, file, metadata={"format": "pt"})
        config.write_text(text)

    key = "model.layers.0.mlp.up_proj.scales"
    save_file({k: v for k, v in tensors.items() if k != key}, file, metadata={"format": "pt"})
    refused("lacks FFN weights: layers.0.mlp.up_proj.scales")
    key = "model.layers.0.self_attn.q_proj.codes"
    save_file({k: v for k, v in tensors.items() if k != key}, file, metadata={"format": "pt"})
    refused("lacks .*q_proj.codes")
    save_file({**tensors, key: tensors[key][:1].contiguous()}, file, metadata={"format": "pt"})
    refused("q_proj.codes has shape")
    edited = json.loads(text)
    edited["quantization_config"]["weights"]["group"] = 64
    config.write_text(json.dumps(edited))
    refused("has shape|cannot be of few bits")
    edited["quantization_config"]["weights"] = {"bits": 4, "wrong": 1}
    config.write_text(json.dumps(edited))
    refused("unknown key 'wrong'")
    edited["quantization_config"]["weights"] = 4
    config.write_text(json.dumps(edited))
    refused("weights=4 is no mapping")
    file.write_bytes(file.read_bytes()[:-100])
    refused("truncated")


def test_sparse_ffns_say_what_they_hold():
    model = lte.quantize(sparse("phi3"), bits=8)
    held, wide = sparse_ffns(model)[0].quantized(), sparse_ffns(model)[0].weights()
    torch.testing.assert_close(held.dequantize().up, wide.up)
    torch.testing.assert_close(held.dequantize().gate, wide.gate)
    torch.testing.assert_close(held.dequantize().down, wide.down)


def test_what_a_token_reads_is_counted():
    from lte.accounting import model_cost, parameter_counts

    for model in (models.build("llama"), sparse("llama"), tie(models.build("llama"))):
        before, numbers = model_cost(model), parameter_counts(model)
        small = lte.quantize(model, bits=4)
        after = model_cost(small)
        assert parameter_counts(small) == numbers
        for a, b in zip(after.layers, before.layers, strict=True):
            assert (a.attention, a.ffn, a.router) == (b.attention, b.ffn, b.router)
        assert after.layers[0].ffn_bytes == before.layers[0].ffn_bytes * 4.5 / 32
        # Norms and biases stay, and rows are stored in whole blocks of 16.
        assert after.dense_bytes == pytest.approx(before.dense_bytes * 4.5 / 32, rel=0.08)
        half = [0.5] * len(after.layers)
        saved = after.bytes_per_token([0.0] * len(half))["sparse"] - after.bytes_per_token(half)["sparse"]
        assert saved == pytest.approx(sum(layer.ffn_bytes for layer in after.layers) / 2)


@pytest.mark.parametrize("made", ["dense", "sparse", "tied"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma"])
def test_with_text_outputs_are_closer(family, made):
    def build():
        model = sparse(family) if made == "sparse" else models.build(family)
        return tie(model) if made == "tied" else model

    text, seen = models.inputs(16, 40, seed=5), []
    inputs = models.inputs(4, 40)
    wanted = logits(build(), inputs)
    plain = off(logits(lte.quantize(build(), bits=4), inputs), wanted)
    model = lte.quantize(build(), bits=4, head_bits=6, calibration=[text], progress=lambda *at: seen.append(at))
    assert off(logits(model, inputs), wanted) < 0.9 * plain
    assert seen[-1][0] == seen[-1][1] == len(seen) == len(quantized_modules(model))
    assert model.model.embed_tokens.bits == 6
    assert {m.bits for layer in model.model.layers for m in quantized_modules(layer)} == {4}
    # Nothing is left on the modules that were watched.
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_tied_embedding_is_rounded_once_with_the_heads_inputs():
    model = lte.quantize(tie(models.build("llama")), bits=4, calibration=[models.inputs(8, 40)])
    names = [type(m).__name__ for m in model.modules() if isinstance(m, QuantizedEmbedding | TiedHead)]
    assert names == ["QuantizedEmbedding", "TiedHead"]


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from lte.cli import app
    from lte.models import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("A small text, of some words and few lines, that is read again and again.\n" * 60)
    dense, made = tmp_path / "dense", tmp_path / "sparse"
    tokenizer = train_tokenizer([text.read_text()], 300)
    for folder, model in ((dense, models.build("llama")), (made, sparse("llama"))):
        model.resize_token_embeddings(300)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def run(*words: object):
        return CliRunner().invoke(app, ["quantize", *map(str, words)], catch_exceptions=True)

    for model, more in ((dense, []), (made, ["--data", text, "--context-length", 32, "--head", "int6"])):
        out = tmp_path / f"{model.name}-4"
        result = run(model, "--weights", "int4", "--out", out, *more)
        assert result.exit_code == 0, result.output
        assert "MB of weights for a token" in result.output
        record = json.loads((out / "lte_quantize.json").read_text())
        assert record["bytes_per_token"]["after"] < 0.3 * record["bytes_per_token"]["before"]
        loaded = lte.load(out)
        assert {m.bits for m in quantized_modules(loaded)} == ({4, 6} if more else {4})
        assert loaded.generate(**models.inputs(1, 4), max_new_tokens=3, pad_token_id=0).shape == (1, 7)
        result = run(model, "--weights", "int4", "--out", out)
        assert "is there already" in str(result.exception)
        assert not list(tmp_path.glob("*.partial"))
    tuned = run(
        dense, "--weights", "int3", "--out", tmp_path / "tuned", "--data", text, "--context-length", 32, "--steps", 3
    )
    assert tuned.exit_code == 0, tuned.output
    assert len(json.loads((tmp_path / "tuned" / "lte_quantize.json").read_text())["losses"]) == 3
    result = run(dense, "--weights", "int3", "--out", tmp_path / "x", "--steps", 3)
    assert "steps=3 need data to train on; give --data" in str(result.exception)
    for wrong in ("int9", "fp4", "4"):
        assert "is no format of weights" in str(run(dense, "--weights", wrong, "--out", tmp_path / "x").exception)
    assert not (tmp_path / "x").exists()
    result = run(tmp_path / "dense-4", "--weights", "int4", "--out", tmp_path / "x")
    assert "of few bits already" in str(result.exception)


@pytest.mark.parametrize("made", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_the_scales_comes_closer_to_the_model_of_before(made, dtype, tmp_path, caplog):
    teacher = (models.build("llama") if made == "dense" else sparse("llama")).to(dtype).eval()
    text = [models.inputs(8, 40, seed=seed) for seed in range(4)]
    model = lte.quantize(copy.deepcopy(teacher), bits=3, calibration=text).eval()
    held, layers = models.inputs(4, 40, seed=9), [m for m in quantized_modules(model) if isinstance(m, QuantizedLinear)]
    wanted = logits(teacher, held).float()

    def divergence():
        found = logits(model, held).float().log_softmax(-1)
        return float((wanted.log_softmax(-1).exp() * (wanted.log_softmax(-1) - found)).sum(-1).mean())

    before, codes, state = divergence(), [layer.codes.clone() for layer in layers], set(model.state_dict())
    with caplog.at_level("INFO", "lte.tuning"):
        losses = lte.tune_quantized(model, teacher, text, 12, learning_rate=1e-2)
    assert "the scales were trained: KL divergence" in caplog.text
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert divergence() < 0.95 * before
    assert all(torch.equal(layer.codes, old) for layer, old in zip(layers, codes, strict=True))
    # What was learned is in the scales, and nothing is left behind.
    assert set(model.state_dict()) == state
    assert {p.dtype for p in model.parameters()} == {dtype} | {p.dtype for p in teacher.parameters()}
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_learned_scale_is_what_a_number_is_multiplied_with():
    layer = QuantizedLinear(70, 20, bits=4, group=32, by_columns=True)
    layer.hold(quantize(torch.randn(20, 70, generator=torch.Generator().manual_seed(0)), 4, 32, by_columns=True))
    x, before = torch.randn(5, 70, generator=torch.Generator().manual_seed(1)), layer.matrix.dequantize()
    factors = layer.learn_scales()
    torch.testing.assert_close(layer(x), x @ before.T)
    factors.data += torch.arange(factors.numel()).view_as(factors) % 7 / 16
    wide = factors.repeat_interleave(32, 1)[:, :70]
    torch.testing.assert_close(layer(x), x @ (before * wide).T)
    layer(x).square().sum().backward()
    plain = (before * wide).detach().requires_grad_()
    (x @ plain.T).square().sum().backward()
    each = torch.nn.functional.pad(plain.grad * before, (0, 26)).view(20, 3, 32).sum(-1)
    torch.testing.assert_close(factors.grad, each, rtol=1e-4, atol=1e-4)
    layer.fix_scales()
    torch.testing.assert_close(layer.matrix.dequantize(), before * wide, rtol=2**-8, atol=0)
    assert layer.factors is None


def test_what_cannot_be_tuned():
    teacher = models.build("llama")
    text = [models.inputs(2, 9)]
    with pytest.raises(ConfigError, match="no weights of few bits whose scales"):
        lte.tune_quantized(teacher, teacher, text, 2)
    model = lte.quantize(models.build("llama"), bits=4)
    with pytest.raises(ConfigError, match="steps=2 need data"):
        lte.tune_quantized(model, teacher, [], 2)
    with pytest.raises(ConfigError, match="steps=0, learning_rate=0.005: at least 1"):
        lte.tune_quantized(model, teacher, text, 0)
    with pytest.raises(ConfigError, match=r"learning_rate=nan"):
        lte.tune_quantized(model, teacher, text, 2, learning_rate=float("nan"))


def test_an_interrupted_tuning_leaves_a_whole_model():
    teacher = models.build("llama")
    model = lte.quantize(copy.deepcopy(teacher), bits=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lte.tune_quantized(model, teacher, [models.inputs(2, 9)], 5, progress=stop)
    after = model.state_dict()
    assert set(after) == set(before)
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name.endswith("scales"))
    logits(model)


def test_rounding_says_nothing_of_its_own_hooks(caplog, monkeypatch):
    monkeypatch.setattr("lte.nn.ffn._said", set())
    lte.quantize(sparse("llama").eval(), bits=4, calibration=[models.inputs(2, 9)])
    assert not caplog.records
