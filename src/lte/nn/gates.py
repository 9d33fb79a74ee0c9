"""The gates of training: what an expert's output is multiplied by, and what the router learns from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lte.nn.routing import Routing
from lte.ops import scale_experts


def straight_through(hidden: Tensor, routing: Routing, hardness: float = 1.0) -> Tensor:
    """Scale experts by the mask in the forward pass, and let the gradient reach the scores as if by them.

    Args:
        hidden: [..., F].
        routing: scores and mask, [..., E].
        hardness: the forward scale is ``hardness * mask + (1 - hardness) * score``: 1 is the mask that inference
            applies, 0 is soft mode.

    Returns:
        [..., F]. The gradient of a score is what the loss would gain from that expert's whole output, for experts
        that did not run too; that is what lets a router learn to open an expert (Bengio et al., 2013).
    """
    out: Tensor = _StraightThrough.apply(hidden, routing.scores, routing.mask, hardness)
    return out


class _StraightThrough(torch.autograd.Function):
    """Keeps nothing for the backward pass beyond ``hidden`` and the routing, which are there anyway."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scores: Tensor, mask: Tensor, hardness: float) -> Tensor:
        ctx.save_for_backward(hidden, scores if hardness < 1 else None, mask)
        ctx.hardness, ctx.score_dtype = hardness, scores.dtype
        return scale_experts(hidden, _scale(scores, mask, hardness))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, scores, mask = ctx.saved_tensors
        (gradient,) = gradients
        gain = None
        if ctx.needs_input_grad[1]:
            shape = (mask.shape[-1], -1)
            gain = (gradient.unflatten(-1, shape) * hidden.unflatten(-1, shape)).sum(-1, dtype=ctx.score_dtype)
        return scale_experts(gradient, _scale(scores, mask, ctx.hardness)), gain, None, None


def _scale(scores: Tensor, mask: Tensor, hardness: float) -> Tensor:
    return mask if hardness >= 1 else torch.lerp(scores, mask.to(scores.dtype), hardness)
