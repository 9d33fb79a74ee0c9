"""Self-prediction: the FFN's own coarse copy picks the neurons. Nothing is learned, and little is measured."""

from __future__ import annotations

from typing import Annotated

import pydantic
from torch import nn

from lte.config import MethodConfig, register_method
from lte.methods.scores import ScoreMethod
from lte.nn import CopyRouter, Router


class SelfPredictionConfig(MethodConfig):
    """Single neurons, picked by a copy of the FFN in few bits.

    Attributes:
        bits: of a weight of the copy.
        group: weights of the copy that share a scale.
    """

    method = "self-prediction"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"
    bits: Annotated[int, pydantic.Field(ge=1, le=4)] = 3
    group: Annotated[int, pydantic.Field(ge=8, multiple_of=8)] = 64


@register_method(SelfPredictionConfig)
class SelfPrediction(ScoreMethod[SelfPredictionConfig]):
    """Calibration data say only how much the loss depends on every layer, so that one threshold serves all."""

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return CopyRouter(n_experts, bits=self.config.bits, group=self.config.group, device=like.device)
