"""Every family: what sparsifying must not change, what saving must keep, and that it still generates and compiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lte
from lte.errors import ConfigError, UnsupportedModelError
from lte.families import FAMILIES
from lte.nn import set_mode, sparse_ffns
from tests import models

FAMILY_NAMES = sorted(models.CONFIGS)
GENERATING = [name for name in FAMILY_NAMES if name not in models.ENCODERS]


def sparsified(name: str, grouping: str = "random", seed: int = 0) -> torch.nn.Module:
    config = lte.LTEConfig(expert_size=models.EXPERT, grouping=grouping, router_init="random")
    return lte.sparsify(models.build(name, seed), config)


@torch.no_grad()
def logits(model: torch.nn.Module, **changes: object) -> torch.Tensor:
    return model(**{**models.inputs(), **changes}).logits


def test_every_row_of_the_table_is_tested():
    assert set(FAMILIES) == {config.model_type for config in models.CONFIGS.values()}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_permutation_leaves_the_dense_outputs_equal(name):
    before = logits(models.build(name))
    model = sparsified(name)
    set_mode(model, "dense")
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_permutation_moves_neurons(name):
    dense = models.build(name).state_dict()
    sparse = sparsified(name).state_dict()
    assert any(not torch.equal(value, sparse[key]) for key, value in dense.items())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_all_experts_on_is_dense(name):
    before = logits(models.build(name))
    model = sparsified(name)
    models.open_routers(model)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_hard_mode_drops_exactly_the_masked_experts(name):
    """The FFN's output against the oracle, from weights read out through the spec."""
    model = sparsified(name)
    models.spread_routers(model)
    ffn = sparse_ffns(model)[1]
    x = torch.randn(7, models.D_MODEL)
    with torch.no_grad():
        mask = ffn.router(x).mask
        expected = lte.ops.sparse_ffn_reference(x, ffn.weights(), mask)
        assert 0.2 < mask.float().mean() < 0.8
        torch.testing.assert_close(ffn(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_state_dict_keeps_the_stock_names(name):
    stock = set(models.build(name).state_dict())
    extra = set(sparsified(name).state_dict()) - stock
    assert stock <= set(sparsified(name).state_dict())
    assert all(".router." in key for key in extra)
    assert len(extra) == 3 * models.LAYERS  # weight, bias, thresholds


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_save_and_reload_sparse(name, tmp_path):
    model = sparsified(name)
    models.spread_routers(model)
    model.save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification if name in models.ENCODERS else AutoModelForCausalLM
    for reloaded in (lte.load(tmp_path), auto.from_pretrained(tmp_path)):
        assert [ffn.mode for ffn in sparse_ffns(reloaded)] == ["hard"] * models.LAYERS
        assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("name", GENERATING)
def test_generate(name):
    model = sparsified(name)
    models.open_routers(model)
    prompt = models.inputs()
    options = {"max_new_tokens": 6, "do_sample": False}
    dense = models.build(name).generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), dense)
    models.spread_routers(model)
    assert model.generate(**prompt, **options).shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_forward_under_torch_compile(name):
    model = sparsified(name)
    models.spread_routers(model)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)


def test_unknown_family_lists_the_known_ones():
    model = AutoModelForCausalLM.from_config(models.UNKNOWN)
    with pytest.raises(UnsupportedModelError, match=r"'gemma2' is not known; known families: bert, .*register_family"):
        lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))


def test_a_family_can_be_registered(monkeypatch):
    monkeypatch.setattr("lte.families.FAMILIES", dict(FAMILIES))
    lte.register_family("gemma2", replace(FAMILIES["gemma"], config_act="hidden_activation"))
    model = AutoModelForCausalLM.from_config(models.UNKNOWN)
    lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    assert len(sparse_ffns(model)) == models.LAYERS


def test_unknown_activation_is_refused():
    model = models.build("llama")
    model.config.hidden_act = "tanh"
    with pytest.raises(UnsupportedModelError, match="activation 'tanh' is not supported; supported: gelu"):
        lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))


def test_indivisible_expert_size_leaves_the_model_untouched():
    model = models.build("opt")
    before = logits(model)
    with pytest.raises(ConfigError, match="d_ff=64 is not divisible by expert_size=24; choose one of 4, 8, 16, 32, 64"):
        lte.sparsify(model, lte.LTEConfig(expert_size=24, grouping="random", router_init="random"))
    assert torch.equal(logits(model), before)
    assert not sparse_ffns(model)


def test_sparsifying_twice_is_refused():
    with pytest.raises(ConfigError, match="sparse already"):
        lte.sparsify(sparsified("llama"), lte.LTEConfig(expert_size=8))
