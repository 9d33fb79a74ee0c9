from __future__ import annotations

import math

import pytest
import torch

from lte.nn import ConstantForm, KeepLargestRouter, LinearForm, LowRankRouter, ThresholdRouter, TopKSoftmaxRouter
from lte.thresholds import shifted


def router(bias: bool = True, **init: float) -> ThresholdRouter:
    made = ThresholdRouter(16, 4, threshold=0.5, bias=bias)
    made.reset_parameters(torch.Generator().manual_seed(0), **{"init_std": 1.0, "init_score": 0.5, **init})
    return made


def test_scores_are_the_sigmoid_of_a_linear_map():
    made, x = router(), torch.randn(3, 5, 16)
    routing = made(x)
    expected = torch.sigmoid(x @ made.weight.T + made.bias)
    torch.testing.assert_close(routing.scores, expected)
    assert torch.equal(routing.mask, expected > 0.5)
    assert routing.mask.shape == (3, 5, 4)


def test_number_of_experts_differs_from_token_to_token():
    counts = router()(torch.randn(64, 16)).mask.sum(-1)
    assert len(counts.unique()) > 2


def test_threshold_moves_the_mask():
    made, x = router(), torch.randn(64, 16)
    share = []
    for threshold in (0.1, 0.5, 0.9):
        made.threshold = threshold
        share.append(float(made(x).mask.float().mean()))
    assert share[0] > share[1] > share[2]


def test_the_lowest_threshold_leaves_nothing_out_and_asks_nobody():
    made = router()
    assert isinstance(made.form(), LinearForm)
    assert not made.runs_all
    made.threshold = shifted(made.threshold, -math.inf)
    assert isinstance(made.form(), ConstantForm)
    with torch.no_grad():
        made.bias.fill_(-50.0)
    assert made(torch.randn(3, 16)).mask.all()


def test_initial_score_and_spread():
    made = ThresholdRouter(256, 64)
    made.reset_parameters(torch.Generator().manual_seed(0), init_std=0.5, init_score=0.7)
    assert made(torch.zeros(1, 256)).scores.mean().item() == pytest.approx(0.7, abs=1e-5)
    logits = torch.logit(made(torch.randn(200, 256)).scores)
    assert logits.std().item() == pytest.approx(0.5, abs=0.05)


def test_initial_weights_follow_the_seed_alone():
    torch.manual_seed(1)
    first = router().weight
    torch.manual_seed(2)
    assert torch.equal(first, router().weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ThresholdRouter(16, 4),
        lambda: LowRankRouter(16, 4, rank=3),
        lambda: TopKSoftmaxRouter(16, 4, k=2),
        lambda: KeepLargestRouter(4),
    ],
    ids=["threshold", "low-rank", "top-k", "oracle"],
)
def test_casting_a_model_leaves_its_routers_as_they_are(make):
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = make()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    before = {name: (value.clone(), value.grad) for name, value in made.named_parameters()}
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), made)
    model.to(torch.bfloat16).half().double().bfloat16().to("cpu", torch.float16)
    assert model[0].weight.dtype == torch.float16
    for name, value in made.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name][0])
        assert value.grad is before[name][1] or torch.equal(value.grad, before[name][1])
    model.to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float32)}
    model.to_empty(device="cpu")
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_the_dtype(dtype):
    made = router().to(dtype)
    x = torch.randn(8, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = made(x).scores
    expected = torch.sigmoid(x.float() @ made.weight.T + made.bias)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected)


def test_without_a_bias():
    made = router(bias=False)
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    assert made(torch.zeros(1, 16)).scores.tolist() == [[0.5] * 4]
    assert not made(torch.zeros(1, 16)).mask.any()
