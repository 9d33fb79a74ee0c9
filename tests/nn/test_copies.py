"""The FFN's own copy: which neurons it picks, and that it follows the weights."""

from __future__ import annotations

import copy

import pytest
import torch

import lte
from lte.accounting import model_cost
from lte.errors import ConfigError
from lte.nn import CopyRouter, sparse_ffns
from lte.ops import ACTIVATIONS
from tests import models


def predicted(name: str, **settings):
    config = lte.SelfPredictionConfig(**{"group": 32, **settings})
    batch = models.inputs(8, 16)
    labelled = batch if name in models.ENCODERS else {**batch, "labels": batch["input_ids"]}
    return lte.sparsify(models.build(name), config, calibration=[labelled]).eval()


@pytest.mark.parametrize("name", sorted(models.CONFIGS))
def test_it_ranks_neurons_by_what_they_add(name):
    model = predicted(name, bits=4)
    for ffn in sparse_ffns(model):
        x = torch.randn(32, models.D_MODEL, generator=torch.Generator().manual_seed(0))
        wanted = ffn.output_norms(x).clamp_min(1e-6).log()
        found = ffn.router(x).margins
        # What is about nothing is ranked by noise; what a ReLU cuts off is not ranked.
        seen = (wanted > wanted.median() - 3) & (wanted > -13) & (found > found.max() - 20)
        assert torch.corrcoef(torch.stack([wanted[seen], found[seen]]))[0, 1] > 0.85


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_it_is_calibrated_saved_and_loaded_without_its_copy(name, tmp_path):
    model = predicted(name)
    batch = models.inputs(4, 12)
    point = lte.calibrate(model, [batch], 0.7)
    assert point.sparsity == pytest.approx(0.7, abs=0.02)
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path).eval()
    assert all(isinstance(ffn.router, CopyRouter) for ffn in sparse_ffns(loaded))
    routers = {key for key in loaded.state_dict() if ".router." in key}
    assert {key.rpartition(".")[2] for key in routers} == {"sensitivity", "importance", "_extra_state"}
    assert len(routers) == 3 * models.LAYERS
    assert not any(p.requires_grad for ffn in sparse_ffns(loaded) for p in ffn.router.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])
        lte.prepare_for_inference(loaded)
        torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cats_looks_at_the_exact_gate(name, weighted):
    config = lte.CATSConfig(weighted=weighted)
    batch = models.inputs(8, 16)
    model = lte.sparsify(models.build(name), config, calibration=[{**batch, "labels": batch["input_ids"]}]).eval()
    ffn = sparse_ffns(model)[0]
    x = torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    weights = ffn.weights()
    bias = weights.up_bias if weights.gate is None else weights.gate_bias
    gate = ACTIVATIONS[weights.activation](torch.nn.functional.linear(x, weights.input_matrix, bias)).abs()
    wanted = gate * weights.down.norm(dim=1) if weighted else gate
    torch.testing.assert_close(ffn.router.scores(x), wanted * ffn.router.sensitivity)
    assert weighted == bool(ffn.router.sensitivity.max() > ffn.router.sensitivity.min())
    if name == "gpt2" and weighted:
        torch.testing.assert_close(wanted, ffn.output_norms(x))
    assert lte.calibrate(model, [batch], 0.7).sparsity == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_an_svd_of_full_rank_is_the_ffn_itself(name, tmp_path):
    batch = models.inputs(8, 16)
    labelled = {**batch, "labels": batch["input_ids"]}
    whole, thin = (
        lte.sparsify(models.build(name), lte.SVDConfig(rank=rank), calibration=[labelled]).eval()
        for rank in (models.D_MODEL, 4)
    )
    ffn = sparse_ffns(whole)[0]
    x = torch.randn(32, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    wanted = ffn.output_norms(x) * ffn.router.sensitivity
    torch.testing.assert_close(ffn.router.scores(x), wanted, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(sparse_ffns(thin)[0].router.scores(x), wanted, rtol=0.1)
    assert lte.calibrate(thin, [batch], 0.7).sparsity == pytest.approx(0.7, abs=0.02)
    thin.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch)[0], thin(**batch)[0])


def test_a_projection_without_a_weight_is_refused_in_words():
    ffn = sparse_ffns(predicted("llama"))[0]
    ffn.up_proj = torch.nn.Identity()
    with pytest.raises(ConfigError, match="Identity stands in the place of an FFN's projection"):
        ffn.router(torch.randn(2, models.D_MODEL))


def test_the_copy_follows_the_weights_and_is_made_once():
    ffn = sparse_ffns(predicted("llama"))[0]
    x = torch.randn(4, models.D_MODEL)
    first = ffn.router(x).margins
    assert ffn.router.copy() is ffn.router.copy()
    twin = copy.deepcopy(ffn)
    with torch.no_grad():
        ffn.weights().up.mul_(2.0)
    assert torch.allclose(ffn.router(x).margins, first + torch.log(torch.tensor(2.0)), atol=1e-4)
    assert torch.equal(twin.router(x).margins, first)


def test_experts_of_several_neurons_are_as_large_as_their_parts():
    one, four = predicted("gpt2"), predicted("gpt2", expert_size=4)
    x = torch.randn(4, models.D_MODEL)
    alone, found = (sparse_ffns(model)[0].router for model in (one, four))
    squares = alone.sensitivity.unflatten(0, (-1, 4)).square().mean(1)
    ratio = found.sensitivity.square() / squares  # to one mean logit over all layers
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    with torch.no_grad():
        alone.sensitivity.copy_(found.sensitivity.repeat_interleave(4))
    wanted = alone.copy().scores(x)
    torch.testing.assert_close(found.copy().scores(x), wanted)
    torch.testing.assert_close(found(x).margins, wanted.unflatten(-1, (-1, 4)).square().sum(-1).sqrt().log())


@pytest.mark.parametrize(("name", "matrices"), [("llama", 2), ("gpt2", 1)])
def test_its_cost_is_that_of_its_bits(name, matrices):
    layer = model_cost(predicted(name, bits=3)).layers[0]
    assert layer.router.multiplies == matrices * models.D_MODEL * models.D_FF
    assert (
        layer.router.bytes
        == matrices * models.D_FF * (models.D_MODEL * 3 // 8 + models.D_MODEL // 32 * 2) + 4 * models.D_FF
    )
    made = sparse_ffns(predicted(name, bits=3))[0].router.copy().packed
    assert layer.router.bytes == sum(tensor.nbytes for tensor in made.tensors())
