from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lte
from lte.accounting import GFLOP, gflops_per_token, layer_costs, parameter_counts
from lte.sparsify import install_sparse_ffns
from tests import models


@pytest.fixture(scope="module")
def llama_7b():
    """LLaMA-7B's shape, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 11008, 32)
    return model


def test_llama_7b_costs_what_the_paper_says(llama_7b):
    """Table 2: 12.06 = 4.00 + 8.06 GFLOPs per token; section 5.5: the router is 1.04 % of the FFN."""
    costs = layer_costs(llama_7b)
    assert sum(cost.attention for cost in costs) * 2 / GFLOP == pytest.approx(4.00, abs=0.005)
    assert sum(cost.ffn for cost in costs) * 2 / GFLOP == pytest.approx(8.06, abs=0.005)
    assert gflops_per_token(costs, [0.0] * 32)["dense"] == pytest.approx(12.06, abs=0.005)

    install_sparse_ffns(llama_7b, lte.LTEConfig())
    costs = layer_costs(llama_7b)
    assert {cost.experts for cost in costs} == {344}
    assert costs[0].router / costs[0].ffn == pytest.approx(0.0104, abs=0.00005)
    flops = gflops_per_token(costs, [0.84] * 32)
    assert flops["dense"] == pytest.approx(12.06, abs=0.005)
    assert flops["sparse"] == pytest.approx(5.38, abs=0.02)


@pytest.mark.parametrize("name", sorted(models.CONFIGS))
def test_sparsifying_does_not_change_what_is_counted(name):
    before = layer_costs(models.build(name))
    after = layer_costs(
        lte.sparsify(
            models.build(name), lte.LTEConfig(expert_size=models.EXPERT, grouping="random", router_init="random")
        )
    )
    matrices = 3 if name in ("llama", "llama-bias-relu", "mistral", "qwen2", "qwen3", "gemma", "phi3") else 2
    for dense, sparse in zip(before, after, strict=True):
        assert dense.ffn == sparse.ffn == matrices * models.D_MODEL * models.D_FF
        assert dense.attention == sparse.attention > 0
        assert sparse.router == models.D_MODEL * models.D_FF // models.EXPERT


def test_sparsity_one_leaves_attention_and_router():
    model = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    costs = layer_costs(model)
    flops = gflops_per_token(costs, [1.0, 1.0])
    assert flops["sparse"] == pytest.approx(flops["router"] + 2 * sum(cost.attention for cost in costs) / GFLOP)
    assert parameter_counts(model)["router"] == 2 * (8 * 32 + 8)
