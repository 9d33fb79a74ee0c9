"""Nothing is left out: a dense model, for the kernels to run or for its weights to be rounded."""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import MethodConfig, register_method
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import ConstantForm, Router, RouterCost, Routing


class DenseConfig(MethodConfig):
    """All neurons run for every token."""

    method = "dense"
    sparsity_is = "its own"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"


class EveryNeuron(Router):
    """Everything runs."""

    uses_threshold = decides = False

    def forward(self, x: Tensor) -> Routing:
        """A full mask, for inputs of shape [..., D]."""
        all_of_them = torch.ones((), device=x.device).expand(*x.shape[:-1], self.n_experts)
        return Routing(all_of_them, all_of_them > 0)

    def form(self) -> ConstantForm:
        """See :meth:`Router.form`."""
        return ConstantForm()

    def cost(self) -> RouterCost:
        """Nothing is decided."""
        return RouterCost(0, 0, 0)


@register_method(DenseConfig)
class Dense(UnlearnedMethod[DenseConfig]):
    """The dense model."""

    decides = "nothing: dense"
    kernels = "run all"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return EveryNeuron(n_experts)
