"""Self-prediction: the FFN's own coarse copy picks the neurons. Nothing is learned, and little is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import pydantic
import torch
from torch import nn

from lte.config import Method, MethodConfig, register_method
from lte.grouping import Calibration
from lte.nn import CopyRouter, Router, SparseFFN
from lte.nn.copies import NOTHING


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
class SelfPrediction(Method[SelfPredictionConfig]):
    """Calibration data say only how much the loss depends on every layer, so that one threshold serves all."""

    @property
    def needs_calibration(self) -> str | None:
        """See :class:`Method`."""
        return "method='self-prediction'"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return CopyRouter(n_experts, bits=self.config.bits, group=self.config.group, device=like.device)

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], calibration: Iterator[Calibration] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        assert calibration is not None
        middles: list[float] = []
        routers = [ffn.router for ffn in ffns if isinstance(ffn.router, CopyRouter)]
        for router, seen in zip(routers, calibration, strict=True):
            router.offset.zero_()
            step = max(1, len(seen.inputs_TD) // 256)
            logits = router(seen.inputs_TD[::step]).margins
            assert logits is not None
            some = logits[logits > math.log(NOTHING) + 1]
            middle = float(some.median()) if len(some) else 0.0
            router.offset.fill_(math.log(max(seen.sensitivity, 1e-20)) if seen.sensitivity is not None else -middle)
            middles.append(middle + float(router.offset))
        for router in routers:
            router.offset.sub_(sum(middles) / len(middles))
