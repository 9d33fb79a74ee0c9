"""What methods share whose routers guess the norms of experts' outputs: one threshold serves all layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lte.config import Method, MethodConfig
from lte.grouping import Calibration
from lte.nn import ScoreRouter, SparseFFN
from lte.nn.router import NOTHING

ConfigT = TypeVar("ConfigT", bound=MethodConfig)

SAMPLED = 256
"""Tokens from which the middle of a layer's scores is taken."""


class ScoreMethod(Method[ConfigT]):
    """Base of such methods; what they fit besides is :meth:`fit`."""

    calibration_tokens, dial_tokens = 1024, 4096

    @property
    def needs_calibration(self) -> str | None:
        """See :class:`Method`: how much the loss depends on every layer is measured."""
        return f"method={self.config.method!r}"

    def fit(self, router: ScoreRouter, seen: Calibration) -> None:
        """Give a router what it has besides its sensitivities."""

    def sensitivity(self, seen: Calibration) -> Tensor | None:
        """How much the loss minds an error of an FFN's output, [F], by the direction in which each neuron pushes it."""
        return seen.neuron_sensitivity_F

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], calibration: Iterator[Calibration] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`. Sensitivities make layers comparable, or where there are none, their middles."""
        assert calibration is not None
        routers = [ffn.router for ffn in ffns if isinstance(ffn.router, ScoreRouter)]
        middles: list[float] = []
        for router, seen in zip(routers, calibration, strict=True):
            self.fit(router, seen)
            known_F = self.sensitivity(seen)
            if known_F is None:
                router.sensitivity.fill_(1.0)
            else:
                squares_E = known_F.float().unflatten(0, (router.n_experts, -1)).square().mean(-1)
                router.sensitivity.copy_(squares_E.sqrt().clamp_min(NOTHING))
            logits = router(seen.inputs_TD[:: max(1, len(seen.inputs_TD) // SAMPLED)]).margins
            assert logits is not None
            some = logits[logits > math.log(NOTHING) + 1]
            middle = float(some.median()) if len(some) else 0.0
            if known_F is None:
                router.sensitivity.mul_(math.exp(-middle))
                middle = 0.0
            middles.append(middle)
        for router in routers:
            router.sensitivity.mul_(math.exp(-sum(middles) / len(middles)))
