"""SparseInfer: signs of weights and inputs say whether a ReLU will let anything through (Shin et al., 2024)."""

from __future__ import annotations

from typing import Annotated

import pydantic
from torch import Tensor, nn

from lte.config import LayerwiseConfig, register_method
from lte.errors import ConfigError
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import LookingRouter, Router, RouterCost, Routing, SparseFFN
from lte.nn.router import uncast


class SparseInferConfig(LayerwiseConfig):
    """Single neurons of FFNs with a ReLU, by how many of the products under it are positive. Nothing is fitted."""

    method = "sparseinfer"

    expert_size: Annotated[int, pydantic.Field(ge=1, le=1)] = 1
    grouping: str = "none"


class SignRouter(LookingRouter):
    """``logit = (positive - negative products) / sqrt(D)``: at a threshold of 0.5 the majority decides."""

    def attach(self, ffn: SparseFFN) -> None:
        """See :meth:`Router.attach`."""
        super().attach(ffn)
        if ffn.activation != "relu":
            raise ConfigError(
                f"method='sparseinfer' is for FFNs with a ReLU, and this model's have {ffn.activation!r}; "
                "self-prediction serves all (with bits=1 it looks at signs too)"
            )

    def forward(self, x: Tensor) -> Routing:
        """Decide for inputs of shape [..., D]."""
        with uncast(x):
            signs_FD = self.ffn.weights().input_matrix.detach().float().sign()
            return self.decide(x.detach().float().sign() @ signs_FD.T / x.shape[-1] ** 0.5)

    def cost(self) -> RouterCost:
        """A bit of every weight under the ReLU; an exclusive or and a count, for 32 weights at a time."""
        size = self.ffn.weights().input_matrix.numel()
        return RouterCost(size // 32, size // 8, 0)


@register_method(SparseInferConfig)
class SparseInfer(UnlearnedMethod[SparseInferConfig]):
    """Counts signs."""

    trains = False
    decides = "signs of weights and inputs"
    families = "with a ReLU"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return SignRouter(n_experts)
