from __future__ import annotations

import pytest
import torch

from lte.nn import Routing
from lte.training import efficiency_loss, separability_loss
from lte.training.losses import total_routing


def test_efficiency_is_the_mean_square_score():
    scores = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert efficiency_loss(scores).tolist() == [0.5, 0.25]


def test_separability_is_the_mean_inverse_squared_distance():
    scores = torch.tensor([[0.0, 1.0], [0.1, 0.9]])
    torch.testing.assert_close(separability_loss(scores, 1e-9), torch.tensor([4.0, 1 / 0.16]))
    torch.testing.assert_close(separability_loss(scores, 0.25), torch.tensor([2.0, 1 / 0.41]))


def test_separability_is_finite_at_the_threshold():
    scores = torch.tensor([[0.5]], requires_grad=True)
    loss = separability_loss(scores, 0.25)
    loss.sum().backward()
    assert loss.item() == pytest.approx(4.0)
    assert scores.grad.item() == 0


def test_separability_pushes_away_from_the_threshold():
    scores = torch.tensor([[0.3, 0.7]], requires_grad=True)
    separability_loss(scores, 0.01).sum().backward()
    lower, upper = scores.grad[0].tolist()
    assert lower > 0 > upper


def test_totals_average_over_layers_and_leave_padding_out():
    routings = [
        Routing(scores.requires_grad_(), scores > 0.5)
        for scores in (torch.tensor([[[1.0, 0.0], [0.9, 0.9]]]), torch.tensor([[[1.0, 1.0], [0.9, 0.9]]]))
    ]
    totals = total_routing(routings, torch.tensor([[True, False]]), epsilon=1e-9)
    assert totals.tokens == 1
    assert float(totals.efficiency) == pytest.approx(0.75)
    assert float(totals.separability) == pytest.approx(4.0)
    logits = [routing.scores.detach()[0, :1].double().logit(eps=1e-9).requires_grad_() for routing in routings]
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    torch.stack([(each + shift).sigmoid().square().mean() for each in logits]).mean().backward()
    assert float(totals.slope) == pytest.approx(float(shift.grad), abs=1e-6)
    assert totals.active_L.tolist() == [0.5, 1.0]
    fixed = [Routing(routing.scores.detach(), routing.mask) for routing in routings]
    idle = total_routing(fixed, torch.tensor([[True, False]]), epsilon=1e-9)
    assert idle.active_L.tolist() == [0.5, 1.0]
    assert idle.efficiency == idle.separability == idle.slope == 0
