"""The two auxiliary losses of LTE (section 4.1), as sums over tokens so that any averaging can be exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte.nn import Routing


def efficiency_loss(scores: Tensor) -> Tensor:
    """``mean over experts of G^2``, per token: [T, E] -> [T]."""
    return scores.square().mean(-1)


def separability_loss(scores: Tensor, epsilon: float) -> Tensor:
    """``mean over experts of 1 / ((G - tau)^2 + epsilon)``, per token: [T, E] -> [T].

    Scores are measured from the threshold (:class:`lte.nn.Routing`), so tau is 0.5.

    The paper's loss has no epsilon, is singular at the threshold, and leaves open how that is avoided. The epsilon
    decides how hard a score near the threshold is thrown to one side before the task could say which; see
    docs/training.md for the measurement behind the default.
    """
    return ((scores - 0.5).square() + epsilon).reciprocal().mean(-1)


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the tokens of one forward; dividing by a token count gives the losses and the sparsity.

    Attributes:
        efficiency, separability: scalars with gradient, already averaged over layers and experts.
        slope: of ``efficiency``, were all logits moved alike.
        active_L: [L], tokens times experts that would run in hard mode, divided by the number of experts.
        tokens: number of tokens that counted.
    """

    efficiency: Tensor
    separability: Tensor
    slope: Tensor
    active_L: Tensor
    tokens: Tensor


def total_routing(routings: Sequence[Routing], token_mask: Tensor | None, *, epsilon: float) -> RoutingTotals:
    """Sum the losses of all layers over the tokens of a batch, padding left out; nothing where no score can learn.

    Args:
        routings: one per layer, scores of shape [..., E].
        token_mask: bool, as many entries as tokens; None counts all.
        epsilon: see :func:`separability_loss`.
    """
    flat = [routing.scores.flatten(0, -2) for routing in routings]
    shares = [routing.shares.flatten(0, -2) for routing in routings]
    keep_T = torch.ones(flat[0].shape[0], device=flat[0].device)
    if token_mask is not None:
        keep_T = token_mask.reshape(-1).to(keep_T)
    active_L = torch.stack([(share.float().mean(-1) * keep_T).sum() for share in shares]).detach()
    if not any(scores.requires_grad for scores in flat):
        nothing = keep_T.new_zeros(())
        return RoutingTotals(nothing, nothing, nothing, active_L, keep_T.sum())
    efficiency = torch.stack([(efficiency_loss(scores) * keep_T).sum() for scores in flat]).mean()
    separability = torch.stack([(separability_loss(scores, epsilon) * keep_T).sum() for scores in flat]).mean()
    slope = torch.stack(
        [((2 * (1 - scores) * scores.square()).mean(-1) * keep_T).sum() for scores in (s.detach() for s in flat)]
    ).mean()
    return RoutingTotals(efficiency, separability, slope, active_L, keep_T.sum())
