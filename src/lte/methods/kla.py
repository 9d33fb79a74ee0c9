"""KLA: keep the k largest activations of every token, as if they were known; what other methods are held against."""

from __future__ import annotations

from typing import Annotated

import pydantic
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import FixedShareRouter, Router, RouterCost


class KLAConfig(FixedShareConfig):
    """An oracle: every activation is computed, and of every token the largest are kept. It saves nothing."""

    method = "kla"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"


class LargestActivationsRouter(FixedShareRouter):
    """Scores neurons by the size of what enters the down projection."""

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return self.ffn.hidden(x).detach().abs()

    def cost(self) -> RouterCost:
        """Nothing: an oracle is not charged for what it looks at."""
        return RouterCost(0, 0, 0)


@register_method(KLAConfig)
class KLA(UnlearnedMethod[KLAConfig]):
    """Looks at what it would have to compute."""

    trains = False
    decides = "the activations themselves"
    kernels = "none, an oracle"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return LargestActivationsRouter(n_experts, sparsity=self.config.sparsity)
