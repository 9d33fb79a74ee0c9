"""WINA: as TEAL, with every input weighed by the norm of what it is multiplied with (Chen et al., 2025).

Without the paper's rotation, which makes columns orthogonal, and with the same share in every matrix: docs/methods.md.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.methods.teal import InputsRouter
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import Router, largest


class WINAConfig(FixedShareConfig):
    """Of every token, the columns of gate and up, and the rows of down, whose ``abs(input) * norm`` is largest run."""

    method = "wina"

    expert_size: Annotated[int, pydantic.Field(ge=1, le=1)] = 1
    grouping: str = "none"


class WeightedRouter(InputsRouter):
    """The same share of every token's inputs, and of its coefficients, the largest by weight.

    Args:
        n_experts: number of neurons.
        sparsity: share that is left out.
    """

    def __init__(self, n_experts: int, *, sparsity: float) -> None:
        super().__init__(n_experts)
        self.sparsity = sparsity

    def keeps(self, x: Tensor) -> Tensor:
        """See :class:`InputsRouter`."""
        weights = self.ffn.weights()
        matrices = [matrix for matrix in (weights.gate, weights.up) if matrix is not None]
        norms_D = torch.cat(matrices).detach().float().norm(dim=0)
        return self._largest(x.detach().abs().float() * norms_D)

    def keeps_hidden(self, hidden: Tensor) -> Tensor:
        """See :class:`InputsRouter`."""
        return self._largest(hidden.detach().abs().float() * self.ffn.weights().down.detach().float().norm(dim=1))

    def _largest(self, scores: Tensor) -> Tensor:
        return largest(scores, max(1, round(scores.shape[-1] * (1 - self.sparsity))))


@register_method(WINAConfig)
class WINA(UnlearnedMethod[WINAConfig]):
    """Looks at weights and inputs."""

    decides = "sizes of inputs times weights"
    kernels = "none: columns, not neurons"
    trains = False

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return WeightedRouter(n_experts, sparsity=self.config.sparsity)
