"""CATS: the gate is computed exactly, and says which neurons run (Lee et al., 2024)."""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import MethodConfig, register_method
from lte.methods.scores import ScoreMethod
from lte.nn import Router, RouterCost, ScoreRouter
from lte.ops import ACTIVATIONS


class CATSConfig(MethodConfig):
    """Single neurons, picked by ``|act(gate x)|``; of a plain FFN, by all it computes before the down projection.

    Attributes:
        weighted: whether the norm of the neuron's row of the down projection counts too; the paper's does not.
    """

    method = "cats"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"
    weighted: bool = False


class GateRouter(ScoreRouter):
    """Guesses a neuron's output by the size of its gate's activation.

    Args:
        n_experts, device: as for :class:`ScoreRouter`.
        weighted: of :class:`CATSConfig`.
    """

    def __init__(self, n_experts: int, *, weighted: bool, device: torch.device | None = None) -> None:
        super().__init__(n_experts, device=device)
        self.weighted = weighted

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        weights = self.ffn.weights()
        bias = weights.up_bias if weights.gate is None else weights.gate_bias
        gate = ACTIVATIONS[weights.activation](nn.functional.linear(x, weights.input_matrix, bias)).abs()
        return gate * (self.unit_scores() if self.weighted else self.neuron_sensitivity())

    def cost(self) -> RouterCost:
        """All of the gate is read, also the rows that are then left out."""
        matrix = self.ffn.weights().input_matrix
        return RouterCost(matrix.numel(), matrix.nbytes, self.sensitivity.numel())


@register_method(CATSConfig)
class CATS(ScoreMethod[CATSConfig]):
    """Looks at the gate."""

    trains = False
    decides = "the exact gate"

    @property
    def by_direction(self) -> bool:
        """See :class:`ScoreMethod`."""
        return self.config.weighted

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return GateRouter(n_experts, weighted=self.config.weighted, device=like.device)
