"""What methods share whose routers guess the norms of experts' outputs: one threshold serves all layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

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
        """Give a router what it has besides its offset."""

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
            router.offset.zero_()
            logits = router(seen.inputs_TD[:: max(1, len(seen.inputs_TD) // SAMPLED)]).margins
            assert logits is not None
            some = logits[logits > math.log(NOTHING) + 1]
            middle = float(some.median()) if len(some) else 0.0
            router.offset.fill_(-middle if seen.sensitivity is None else math.log(max(seen.sensitivity, NOTHING)))
            middles.append(middle + float(router.offset))
        for router in routers:
            router.offset.sub_(sum(middles) / len(middles))
