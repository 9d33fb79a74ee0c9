"""ReLUfication: the activation becomes a ReLU, and what it cuts off is left out (Mirzadeh et al., ICLR 2024)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar, Literal

import pydantic
from torch import Tensor, nn

from lte.config import MethodConfig, register_method
from lte.methods.cats import activated_inputs, cost_of_inputs
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import HalfForm, LookingRouter, Router, RouterCost, Routing


class ReLUficationConfig(MethodConfig):
    """Single neurons of FFNs with a ReLU in the place of their activation; how many run is up to the model."""

    method = "relufication"
    sparsity_is: ClassVar[str] = "its own"

    expert_size: Annotated[int, pydantic.Field(ge=1, le=1)] = 1
    grouping: str = "none"
    activation: Literal["relu"] = "relu"


class PositiveRouter(LookingRouter):
    """Neurons whose input to the ReLU is positive: leaving out the others changes nothing."""

    uses_threshold = False

    def forward(self, x: Tensor) -> Routing:
        """Decide for inputs of shape [..., D]."""
        mask = activated_inputs(self.ffn, x).detach() > 0
        return Routing(mask.float(), mask)

    def form(self) -> HalfForm | None:
        """See :meth:`Router.form`."""
        return None if self.ffn.weights().gate is None else HalfForm("gate", partial(activated_inputs, self.ffn))

    def cost(self) -> RouterCost:
        """All of the matrix under the ReLU is read, also the rows of neurons that do not run."""
        return cost_of_inputs(self.ffn, 0, half=self.form() is not None)


@register_method(ReLUficationConfig)
class ReLUfication(UnlearnedMethod[ReLUficationConfig]):
    """Looks at what the ReLU lets through."""

    decides = "the ReLU itself"
    kernels = "go on from there, if the FFN is gated"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return PositiveRouter(n_experts)
