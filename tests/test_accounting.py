from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lte
from lte.accounting import GFLOP, model_cost, parameter_counts
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
    cost = model_cost(llama_7b)
    assert sum(layer.attention for layer in cost.layers) * 2 / GFLOP == pytest.approx(4.00, abs=0.005)
    assert sum(layer.ffn for layer in cost.layers) * 2 / GFLOP == pytest.approx(8.06, abs=0.005)
    assert cost.gflops_per_token([])["dense"] == pytest.approx(12.06, abs=0.005)

    install_sparse_ffns(llama_7b, lte.LTEConfig())
    cost = model_cost(llama_7b)
    assert {layer.experts for layer in cost.layers} == {344}
    assert cost.layers[0].router.multiplies / cost.layers[0].ffn == pytest.approx(0.0104, abs=0.00005)
    flops = cost.gflops_per_token([0.84] * 32)
    assert flops["dense"] == pytest.approx(12.06, abs=0.005)
    assert flops["sparse"] == pytest.approx(5.38, abs=0.02)


@pytest.mark.parametrize("name", sorted(models.CONFIGS))
def test_sparsifying_does_not_change_what_is_counted(name):
    before = model_cost(models.build(name))
    after = model_cost(
        lte.sparsify(
            models.build(name), lte.LTEConfig(expert_size=models.EXPERT, grouping="random", router_init="random")
        )
    )
    matrices = 3 if name in ("llama", "llama-bias-relu", "mistral", "qwen2", "qwen3", "gemma", "phi3") else 2
    for dense, sparse in zip(before.layers, after.layers, strict=True):
        assert dense.ffn == sparse.ffn == matrices * models.D_MODEL * models.D_FF
        assert dense.attention == sparse.attention > 0
        assert sparse.router.multiplies == models.D_MODEL * models.D_FF // models.EXPERT
    assert before.dense_bytes == after.dense_bytes


def test_sparsity_one_leaves_attention_and_router():
    model = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    cost = model_cost(model)
    flops = cost.gflops_per_token([1.0, 1.0])
    assert flops["sparse"] == pytest.approx(flops["router"] + 2 * sum(layer.attention for layer in cost.layers) / GFLOP)
    assert parameter_counts(model)["router"] == 2 * (8 * 32 + 8)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_every_weight_that_a_token_needs(tied):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    every = sum(p.nbytes for p in model.parameters())
    table = 100 * 32 * 2
    dense = every if tied else every - table  # the table is read as the head, or a row of it is
    assert model_cost(model).bytes_per_token([]) == {"dense": dense, "sparse": dense, "router": 0}
    lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    routers, ffn = 2 * (8 * 32 + 8) * 4, 3 * 32 * 64 * 2
    found = model_cost(model).bytes_per_token([0.5, 0.25])
    assert found == {"dense": dense, "sparse": dense - 0.75 * ffn + routers, "router": routers}


def test_layers_left_dense_cost_what_they_did():
    config = lte.LTEConfig(expert_size=8, grouping="random", router_init="random", layers=[1])
    model = lte.sparsify(models.build("llama"), config)
    cost, dense = model_cost(model), model_cost(models.build("llama"))
    assert [layer.experts for layer in cost.layers] == [0, 8]
    assert [layer.ffn for layer in cost.layers] == [layer.ffn for layer in dense.layers]
    saved = dense.gflops_per_token([])["dense"] + cost.gflops_per_token([1.0])["router"]
    assert cost.gflops_per_token([1.0])["sparse"] == pytest.approx(saved - 2 * cost.layers[1].ffn / GFLOP)
