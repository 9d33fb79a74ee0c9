"""Methods that decide over whole blocks, or layer after layer: TEAL with attention, Wanda."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lte
from lte.accounting import model_cost
from lte.config import METHODS
from lte.errors import ConfigError
from lte.families import blocks_of
from lte.methods import block_inputs, teal
from lte.nn import SparsityMeter, Thresholded, observe_routing, set_mode, sparse_ffns
from lte.quantization import quantize
from tests import models
from tests.methods.test_every_method import zeros_by_hand

FAMILIES = ["llama", "phi3", "gpt2", "opt", "gpt_neox", "bert"]


def batch_of(rows: int, length: int, seed: int = 1):
    return models.inputs(rows, length, seed=seed)


def made(family: str = "llama", **settings):
    config = lte.TEALConfig(**{"sparsity": 0.5, "attention": True, **settings})
    return lte.sparsify(models.build(family), config, calibration=[batch_of(8, 16), batch_of(8, 16, 2)]).eval()


def of_ffns(model, batch):
    meter = SparsityMeter(models.LAYERS)
    meter.set_token_mask(torch.ones_like(batch["input_ids"]).bool())
    with torch.no_grad(), observe_routing(model, meter):
        model(**batch)
    return meter.per_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_small_inputs_of_all_linear_layers_are_left_out(family, tmp_path):
    model, batch = made(family), batch_of(2, 9)
    with torch.no_grad():
        got = model(**batch)[0]
    # By hand: a stock model, whose projections see what is larger than the thresholds alone.
    stock = models.build(family)
    for block, theirs in zip(blocks_of(stock), blocks_of(model), strict=True):
        found = {name: module for name, module in theirs.named_modules() if isinstance(module, Thresholded)}
        assert found
        for name, module in found.items():
            assert float(module.tau) > 0

            def leave_out(plain, args, tau=float(module.tau)):
                return (args[0] * (args[0].abs() > tau),)

            block.get_submodule(name).register_forward_pre_hook(leave_out)
    own = lte.sparsify(stock, lte.TEALConfig(sparsity=0.5), calibration=[batch])
    for ffn, theirs in zip(sparse_ffns(own), sparse_ffns(model), strict=True):
        ffn.router.taus.data.copy_(theirs.router.taus)
    with torch.no_grad():
        torch.testing.assert_close(got, own.eval()(**batch)[0], atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(lte.load(tmp_path).eval()(**batch)[0], got)
        torch.testing.assert_close(copy.deepcopy(model)(**batch)[0], got)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sparsity_is_of_all_linear_layers(family):
    model, other = made(family), batch_of(64, 16, seed=5)
    per_layer = of_ffns(model, other)
    kept = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: kept.update({module: float(module.keeps(args[0]).float().mean())})
        )
        for module in model.modules()
        if isinstance(module, Thresholded)
    ]
    of_ffns(model, other)
    for handle in handles:
        handle.remove()
    for module, share in kept.items():
        assert 1 - share == pytest.approx(module.share, abs=0.05)
    cost = model_cost(model)
    assert cost.linear_sparsity(per_layer) == pytest.approx(0.5, abs=0.01)
    flops, read = cost.gflops_per_token(per_layer), cost.bytes_per_token(per_layer)
    assert flops["sparse"] / flops["dense"] == pytest.approx(1 - cost.linear_sparsity(per_layer))
    dense = model_cost(models.build(family))
    assert dense.gflops_per_token([])["dense"] == pytest.approx(flops["dense"])
    of_linears = 4 * sum(layer.attention + layer.ffn for layer in cost.layers)
    assert read["dense"] - read["sparse"] == pytest.approx(cost.linear_sparsity(per_layer) * of_linears, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_self_prediction_leaves_out_inputs_of_attention_too(family, tmp_path):
    batches = [batch_of(8, 16), batch_of(8, 16, 2)]
    model = lte.sparsify(models.build(family), lte.SelfPredictionConfig(attention=0.4), calibration=batches).eval()
    found = [module for module in model.modules() if isinstance(module, Thresholded)]
    left_out = sum(module.share * module.weight.numel() for module in found)
    assert left_out == pytest.approx(0.4 * sum(module.weight.numel() for module in found))
    # Thresholds are quantiles of what comes through whole FFNs.
    whole = lte.sparsify(models.build(family), lte.SelfPredictionConfig(attention=0.4), calibration=batches).eval()
    set_mode(whole, "dense")
    for run in lte.activations.runs_of_blocks(whole, blocks_of(whole), batches):
        parts = block_inputs.attention_parts(run.block)
        for part, seen in zip(parts, block_inputs.seen_by(parts, run), strict=True):
            assert float((seen <= part.watched.tau).float().mean()) == pytest.approx(part.watched.share, abs=0.02)
    cost = model_cost(model)
    per_layer = of_ffns(model, batch_of(4, 16))
    saved = sum(layer.ffn * share for layer, share in zip(cost.layers, per_layer, strict=True)) + left_out
    wanted = saved / sum(layer.attention + layer.ffn for layer in cost.layers)
    assert cost.linear_sparsity(per_layer) == pytest.approx(wanted, rel=1e-4)
    batch = batch_of(2, 9)
    with torch.no_grad():
        got = model(**batch)[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(lte.load(tmp_path).eval()(**batch)[0], got)


def test_the_greedy_division_is_better_than_the_even_one():
    batch = batch_of(16, 16)
    with torch.no_grad():
        wanted = models.build("llama")(**batch)[0]
        errors = [float((made(divide=divide)(**batch)[0] - wanted).square().mean()) for divide in (True, False)]
    assert errors[0] < errors[1]
    even = {module.share for module in made(divide=False).modules() if isinstance(module, Thresholded)}
    assert even == {0.5}


def test_a_greedy_step_is_the_one_that_changes_least(monkeypatch):
    """Against a search written anew: of one block, the first step of every order."""
    monkeypatch.setattr(block_inputs, "STEP", 0.3)
    model = made(sparsity=0.01)  # less than any step: one matrix alone has a share
    block, ffn = blocks_of(model)[0], sparse_ffns(model)[0]
    parts = teal._parts(block, ffn)
    shares = [module.share for module in block.modules() if isinstance(module, Thresholded)]
    chosen = [index for index, share in enumerate(shares) if share] or [len(shares) + int(ffn.router.taus[1] > 0)]
    run = next(lte.activations.runs_of_blocks(model, blocks_of(model), [batch_of(8, 16)]))
    for part in parts:
        part.set(torch.zeros(()), 0.0)
    wanted, seen = run(), [values.flatten() for values in block_inputs.seen_by(parts, run)]
    costs = []
    for part, values in zip(parts, seen, strict=True):
        part.set(values.kthvalue(round(0.3 * len(values))).values, 0.3)
        costs.append(float((run() - wanted).square().mean()) / part.weights)
        part.set(torch.zeros(()), 0.0)
    assert chosen == [costs.index(min(costs))]


def test_a_threshold_keeps_its_bits_in_any_dtype(tmp_path):
    model = made()
    before = [float(module.tau) for module in model.modules() if isinstance(module, Thresholded)]
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert before == [float(module.tau) for module in half.modules() if isinstance(module, Thresholded)]
    half.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path, dtype=torch.bfloat16)
    assert before == [float(module.tau) for module in loaded.modules() if isinstance(module, Thresholded)]


def test_it_generates_prepared_and_not_with_the_same_tokens():
    model, ids = made(), batch_of(1, 5)
    wanted = model.generate(**ids, max_new_tokens=6, do_sample=False)
    lte.prepare_for_inference(model)
    assert torch.equal(model.generate(**ids, max_new_tokens=6, do_sample=False), wanted)


def test_it_is_pickled_and_comes_back_the_same():
    model, batch = made(), batch_of(2, 9)
    back = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(back(**batch)[0], model(**batch)[0])


def test_more_than_any_matrix_gets_is_refused():
    with pytest.raises(ConfigError, match="sparsity=0.95: no matrix gets more than 0.9"):
        made(sparsity=0.95)


def test_wanda_that_fails_leaves_the_weights_as_they_were(monkeypatch):
    model, calls = models.build("llama"), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keeps = METHODS["wanda"][1].keeps

    def fail_late(self, scores):
        calls.append(scores)
        if len(calls) == 5:  # in the second layer
            raise MemoryError
        return keeps(self, scores)

    monkeypatch.setattr(METHODS["wanda"][1], "keeps", fail_late)
    with pytest.raises(MemoryError):
        lte.sparsify(model, METHODS["wanda"][0](sparsity=0.5), calibration=[batch_of(8, 16)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_not_made_of_few_bits():
    with pytest.raises(ConfigError, match="experts of 1 neurons cannot be of few bits"):
        quantize(made(), bits=8, calibration=[batch_of(2, 16)])


def test_a_conversion_that_fails_gives_the_plain_projections_back(monkeypatch):
    def fail(self, model, batches):
        raise ConfigError("no")

    monkeypatch.setattr(METHODS["teal"][1], "fit_blocks", fail)
    model = models.build("llama")
    with pytest.raises(ConfigError, match="no"):
        lte.sparsify(model, lte.TEALConfig(attention=True), calibration=[batch_of(2, 9)])
    assert not any(isinstance(module, Thresholded) for module in model.modules())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_padding_says_nothing_of_a_threshold():
    ids = batch_of(8, 16)["input_ids"]
    padded = torch.cat([ids, torch.zeros(8, 30, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(8, 30, dtype=torch.long)], 1)
    found = []
    for batch in (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": padded, "attention_mask": mask},
    ):
        model = lte.sparsify(models.build("llama"), lte.TEALConfig(attention=True, divide=False), calibration=[batch])
        found.append([float(module.tau) for module in model.modules() if isinstance(module, Thresholded)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_wanda_looks_at_the_model_as_pruned_so_far():
    batch = batch_of(8, 16)
    config = METHODS["wanda"][0](sparsity=0.5)
    model = lte.sparsify(models.build("llama"), config, calibration=[batch])
    # By hand: a stock model whose first FFN has those zeros; what its second sees.
    stock, seen = models.build("llama"), []
    first = sparse_ffns(model)[0]
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(stock.model.layers[0].mlp, name).weight.data.copy_(getattr(first, name).weight)
    mlp = stock.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        stock(**batch)
    weight = mlp.gate_proj.weight.detach()
    kept = zeros_by_hand(weight.abs() * seen[0].norm(dim=0), "unstructured")
    torch.testing.assert_close(sparse_ffns(model)[1].gate_proj.weight, weight * kept)
