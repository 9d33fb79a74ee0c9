"""CATS: the gate is computed exactly, and says which neurons run (Lee et al., 2024)."""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import LayerwiseConfig, register_method
from lte.methods.scores import ScoreMethod
from lte.nn import HalfForm, Router, RouterCost, ScoreRouter, SparseFFN
from lte.ops import ACTIVATIONS, fast_linear


class CATSConfig(LayerwiseConfig):
    """Single neurons, picked by ``|act(gate x)|``; of a plain FFN, by all it computes before the down projection.

    Attributes:
        weighted: whether the norm of the neuron's row of the down projection counts too; the paper's does not.
    """

    method = "cats"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"
    weighted: bool = False


def activated_inputs(ffn: SparseFFN, x: Tensor) -> Tensor:
    """The gate's activations, or of a plain FFN all it computes before the down projection: [..., D] -> [..., F]."""
    weights = ffn.weights()
    bias = weights.up_bias if weights.gate is None else weights.gate_bias
    return ACTIVATIONS[weights.activation](fast_linear(x, weights.input_matrix, bias))


def cost_of_inputs(ffn: SparseFFN, parameters: int, *, half: bool) -> RouterCost:
    """Of :func:`activated_inputs`; ``half``: kernels go on from there."""
    matrix = ffn.weights().input_matrix
    return RouterCost(matrix.numel(), matrix.nbytes, parameters, of_ffn=half)


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
        return self.scores_of(activated_inputs(self.ffn, x))

    def scores_of(self, gate: Tensor) -> Tensor:
        """The same from the gate's activations."""
        return gate.abs() * (self.unit_scores() if self.weighted else self.neuron_sensitivity())

    def form(self) -> HalfForm | None:
        """See :meth:`Router.form`; of a plain FFN all but the down projection is computed."""
        if self.ffn.weights().gate is None or self.n_experts < self.ffn.weights().d_ff:
            return None
        return HalfForm("gate", self._decide)

    def _decide(self, x_TD: Tensor) -> Tensor:
        gate_TF = activated_inputs(self.ffn, x_TD)
        return gate_TF.where(self.decide_by(self.scores_of(gate_TF).float()).mask, 0.0)

    def cost(self) -> RouterCost:
        """All of the gate is read, also the rows of neurons that do not run."""
        return cost_of_inputs(self.ffn, self.sensitivity.numel(), half=self.form() is not None)


@register_method(CATSConfig)
class CATS(ScoreMethod[CATSConfig]):
    """Looks at the gate."""

    trains = False
    decides = "the exact gate"
    kernels = "go on from there, if the FFN is gated"

    @property
    def by_direction(self) -> bool:
        """See :class:`ScoreMethod`."""
        return self.config.weighted

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return GateRouter(n_experts, weighted=self.config.weighted, device=like.device)
