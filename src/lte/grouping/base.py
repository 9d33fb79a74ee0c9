"""What a grouping is: an order of the neurons in which experts are contiguous and equally large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lte.errors import ConfigError
from lte.ops.weights import FFNWeights


@dataclass(frozen=True)
class NeuronGrouping:
    """A permutation of an FFN's neurons; expert ``e`` is positions ``e*expert_size .. (e+1)*expert_size-1``.

    Attributes:
        permutation: [F] long, new position -> old neuron.
        expert_size: neurons per expert.
    """

    permutation: Tensor
    expert_size: int

    def __post_init__(self) -> None:
        check_divisible(self.permutation.numel(), self.expert_size)
        order = self.permutation.sort().values
        if not torch.equal(order, torch.arange(order.numel(), device=order.device)):
            raise ConfigError("a grouping must name every neuron exactly once")

    @classmethod
    def from_labels(cls, labels: Tensor, expert_size: int) -> NeuronGrouping:
        """From one expert number per neuron, [F] long; inside an expert neurons keep their order."""
        counts = torch.bincount(labels)
        if not torch.all(counts == expert_size):
            raise ConfigError(f"experts must hold exactly {expert_size} neurons, got sizes {counts.tolist()}")
        return cls(torch.argsort(labels, stable=True), expert_size)

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.permutation.numel() // self.expert_size


class GroupingFn(Protocol):
    """The one signature of every grouping. Deterministic for a seed, whatever the global random state."""

    def __call__(
        self, weights: FFNWeights, expert_size: int, *, seed: int, activations: Tensor | None = None
    ) -> NeuronGrouping:
        """Group the neurons of one FFN.

        Args:
            weights: the FFN, on any device and in any floating dtype.
            expert_size: neurons per expert; divides F.
            seed: of the grouping's own random generator.
            activations: [T, F] values entering the down projection for T calibration tokens, where the
                grouping asks for them.
        """
        ...


def check_divisible(d_ff: int, expert_size: int) -> None:
    """Raise ConfigError, listing sizes that fit, unless ``expert_size`` divides ``d_ff``."""
    if expert_size < 1 or d_ff % expert_size:
        fitting = [size for size in range(4, 129) if d_ff % size == 0] or [
            size for size in range(1, d_ff + 1) if d_ff % size == 0
        ]
        raise ConfigError(
            f"d_ff={d_ff} is not divisible by expert_size={expert_size}; choose one of {', '.join(map(str, fitting))}"
        )
