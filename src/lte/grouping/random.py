"""Groupings that look at nothing: at random, the yardstick for the others, and as the neurons are."""

from __future__ import annotations

import torch

from lte.grouping.base import Activations, NeuronGrouping, check_divisible
from lte.ops.weights import FFNWeights


def group_random(
    weights: FFNWeights, expert_size: int, *, seed: int, activations: Activations | None = None
) -> NeuronGrouping:
    """Assign neurons to experts at random; see :class:`lte.grouping.GroupingFn`."""
    check_divisible(weights.d_ff, expert_size)
    generator = torch.Generator().manual_seed(seed)
    return NeuronGrouping(torch.randperm(weights.d_ff, generator=generator), expert_size)


def group_none(
    weights: FFNWeights, expert_size: int, *, seed: int, activations: Activations | None = None
) -> NeuronGrouping:
    """Leave the neurons where they are, as where every expert is one; see :class:`lte.grouping.GroupingFn`."""
    check_divisible(weights.d_ff, expert_size)
    return NeuronGrouping(torch.arange(weights.d_ff), expert_size)
