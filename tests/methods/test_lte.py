from __future__ import annotations

import pytest
import torch

import lte
from lte.errors import ConfigError
from lte.nn import LowRankRouter, SparsityMeter, observe_routing, sparse_ffns
from tests import models


def labelled(name: str) -> list[dict[str, torch.Tensor]]:
    batch = models.inputs(8, 16)
    return [batch if name in models.ENCODERS else {**batch, "labels": batch["input_ids"]}]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "bert"])
@pytest.mark.parametrize("rank", [None, 6])
def test_the_energy_start_ranks_experts_by_what_they_add(name, rank):
    config = lte.LTEConfig(expert_size=models.EXPERT, router_rank=rank)
    model = lte.sparsify(models.build(name), config, calibration=labelled(name)).eval()
    ffns = sparse_ffns(model)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(ffn, args):
        hidden = ffn.hidden(args[0]).flatten(0, -2).unflatten(1, (ffn.router.n_experts, -1))
        norms = torch.einsum("tek,ekd->ted", hidden, ffn.weights().down.unflatten(0, (ffn.router.n_experts, -1)))
        kept[ffn.layer_index] = norms.norm(dim=2).flatten(), ffn.router.logits(args[0]).flatten()

    for ffn in ffns:
        ffn.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(**models.inputs(8, 16))
    for energy, logits in kept.values():
        assert torch.corrcoef(torch.stack([energy, logits]))[0, 1] > 0.3
    assert all(isinstance(ffn.router, LowRankRouter) == (rank is not None) for ffn in ffns)


def test_the_start_is_nearly_dense_and_its_logits_have_the_spread_asked_for():
    config = lte.LTEConfig(expert_size=models.EXPERT, router_init_score=0.99)
    model = lte.sparsify(models.build("llama"), config, calibration=labelled("llama")).eval()
    meter = SparsityMeter(models.LAYERS)
    meter.set_token_mask(torch.ones(8, 16, dtype=torch.bool))
    with torch.no_grad(), observe_routing(model, meter):
        model(**models.inputs(8, 16))
    assert meter.overall < 0.1


def test_calibration_leaves_gradients_and_modes_as_they_were():
    model = models.build("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    lte.sparsify(model, lte.LTEConfig(expert_size=models.EXPERT), calibration=labelled("llama"))
    assert not model.model.embed_tokens.weight.requires_grad
    assert all(p.requires_grad and p.grad is None for n, p in model.named_parameters() if "embed" not in n)
    assert {str(ffn.mode) for ffn in sparse_ffns(model)} == {"hard"}


def test_without_calibration_data_the_error_says_what_else_there_is():
    with pytest.raises(ConfigError, match=r"router_init='energy' needs calibration data.*or choose grouping='kmeans'"):
        lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="random"))
    with pytest.raises(ConfigError, match=r"grouping='predicted' needs calibration data"):
        lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8), calibration=[])


def test_a_failed_calibration_leaves_the_dense_model():
    model = models.build("opt").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = models.inputs(2, 8)
    with pytest.raises(ValueError, match="batch_size"):
        lte.sparsify(model, lte.LTEConfig(expert_size=8), calibration=[{**batch, "labels": torch.zeros(3, 8).long()}])
    assert not sparse_ffns(model)
    assert model.training
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(dict(model.state_dict()), before)
    lte.sparsify(model, lte.LTEConfig(expert_size=8), calibration=labelled("opt"))


def test_a_router_without_bias_cannot_start_elsewhere_than_at_a_half():
    with pytest.raises(ConfigError, match="router_bias=false needs router_init=random and router_init_score=0.5"):
        lte.LTEConfig(router_bias=False, router_init="energy")
    assert lte.LTEConfig(router_bias=False).router_init == "random"  # also what older checkpoints mean


@pytest.mark.parametrize("settings", [{"router_rank": 4}, {"method": "softmax-topk", "sparsity": 0.75}])
def test_other_routers_save_and_load(tmp_path, settings):
    settings = {"expert_size": models.EXPERT, "grouping": "random", **settings}
    if settings.pop("method", None):
        config = lte.TopKConfig(**settings)
    else:
        config = lte.LTEConfig(router_init="random", router_init_score=0.5, **settings)
    model = lte.sparsify(models.build("llama"), config).eval()
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path).eval()
    batch = models.inputs(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_top_k_runs_the_same_number_of_experts_for_every_token():
    config = lte.TopKConfig(expert_size=models.EXPERT, grouping="random", sparsity=0.75)
    model = lte.sparsify(models.build("llama"), config).eval()
    router = sparse_ffns(model)[0].router
    x = torch.randn(3, 5, router.weight.shape[1])
    routing = router(x)
    best = (x @ router.weight.T).topk(router.k).indices
    assert torch.equal(routing.mask, torch.zeros_like(routing.mask).scatter(-1, best, True))
    assert set(routing.mask.sum(-1).flatten().tolist()) == {router.k}
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(3, 5))
    router.train()
    assert not torch.equal(router(torch.ones(1, router.weight.shape[1])).scores, routing.scores[0, :1])
