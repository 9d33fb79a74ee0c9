from __future__ import annotations

import pytest
import torch

from lte.nn import Routing, set_mode, sparse_ffns
from lte.nn.gates import straight_through
from tests import models
from tests.training.common import sparse_model

T, E, K = 5, 3, 4


def inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, E * K, generator=generator, dtype=dtype).requires_grad_()
    scores = torch.rand(T, E, generator=generator, dtype=dtype).requires_grad_()
    return hidden, scores, scores > 0.5


@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
def test_forward_blends_and_gradients_are_those_of_the_scores(hardness):
    hidden, scores, mask = inputs()
    out = straight_through(hidden, Routing(scores, mask), hardness)
    scale = hardness * mask + (1 - hardness) * scores
    torch.testing.assert_close(out, hidden * scale.repeat_interleave(K, dim=1))
    (out + 1).cos().sum().backward()
    # the written-out form: a forward value with the gradient of the scores
    plain_hidden, plain_scores = (t.detach().clone().requires_grad_() for t in (hidden, scores))
    gate = scale.detach() + plain_scores - plain_scores.detach()
    (plain_hidden * gate.repeat_interleave(K, dim=1) + 1).cos().sum().backward()
    torch.testing.assert_close(hidden.grad, plain_hidden.grad)
    torch.testing.assert_close(scores.grad, plain_scores.grad)
    assert (scores.grad[~mask] != 0).all()


def test_a_masked_expert_that_overflowed_is_zero():
    hidden, scores, mask = inputs()
    mask = torch.zeros_like(mask)
    broken = hidden.detach().clone()
    broken[:, 0] = float("inf")
    assert torch.equal(straight_through(broken, Routing(scores, mask)), torch.zeros(T, E * K, dtype=torch.float64))


def test_scores_stay_float32_beside_bf16_hidden():
    hidden, scores, mask = inputs(torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    out = straight_through(low, Routing(scores, mask))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert (low.grad.dtype, scores.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_a_model_computes_in_training_what_hard_mode_computes(name):
    model = sparse_model(name, router_init_score=0.5).eval()
    batch = models.inputs(2, 7)
    hard = model(**batch).logits
    set_mode(model, "straight-through")
    through = model(**batch).logits
    torch.testing.assert_close(through, hard, atol=1e-5, rtol=1e-5)
    through.sum().backward()
    assert all(ffn.router.weight.grad.abs().sum() > 0 for ffn in sparse_ffns(model))
