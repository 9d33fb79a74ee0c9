"""An oracle that keeps the experts with the largest outputs: the yardstick for routers, and no way to save time."""

from __future__ import annotations

from torch import nn

from lte.config import MethodConfig, register_method
from lte.methods.scores import ScoreMethod
from lte.nn import KeepLargestRouter, Router


class OracleConfig(MethodConfig):
    """The dense model with the experts left out whose outputs, weighted by their layer's sensitivity, are smallest.

    Nothing is learned; ``lte sparsify --set sparsity.method=oracle`` sets the threshold for a target.
    """

    method = "oracle"


@register_method(OracleConfig)
class Oracle(ScoreMethod[OracleConfig]):
    """Looks at what every expert would add."""

    trains = False
    decides = "the outputs themselves"
    kernels = "none, an oracle"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return KeepLargestRouter(n_experts, device=like.device)
