"""An oracle that keeps the experts with the largest outputs: the yardstick for routers, and no way to save time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lte.config import Method, MethodConfig, register_method
from lte.grouping import Calibration
from lte.nn import KeepLargestRouter, Router, SparseFFN


class OracleConfig(MethodConfig):
    """The dense model with the experts left out whose outputs, weighted by their layer's sensitivity, are smallest.

    Nothing is learned; ``lte sparsify --set sparsity.method=oracle`` sets the threshold for a target.
    """

    method = "oracle"


@register_method(OracleConfig)
class Oracle(Method[OracleConfig]):
    """Looks at what every expert would add."""

    @property
    def needs_calibration(self) -> str | None:
        """See :class:`Method`."""
        return "method='oracle'"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return KeepLargestRouter(n_experts, device=like.device)

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], calibration: Iterator[Calibration] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        assert calibration is not None
        typical = []
        for ffn, seen in zip(ffns, calibration, strict=True):
            assert isinstance(ffn.router, KeepLargestRouter)
            norms = torch.cat([ffn.expert_norms(hidden_tF) for _, (_, hidden_tF) in seen.chunks(step=8)])
            scale = seen.sensitivity if seen.sensitivity is not None else 1 / float(norms.mean())
            ffn.router.offset.fill_(math.log(max(scale, 1e-20)))
            typical.append(float(norms.median().clamp_min(1e-20).log() + ffn.router.offset))
        for ffn in ffns:
            assert isinstance(ffn.router, KeepLargestRouter)
            ffn.router.offset.sub_(sum(typical) / len(typical))
