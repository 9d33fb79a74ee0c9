"""What methods share whose routers guess the norms of experts' outputs: one threshold serves all layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lte.config import Method, MethodConfig
from lte.grouping import Activations, NeuronGradients
from lte.nn import ScoreRouter, SparseFFN
from lte.nn.router import NOTHING
from lte.ops import FFNWeights

ConfigT = TypeVar("ConfigT", bound=MethodConfig)

SAMPLED = 256
"""Tokens from which the middle of a layer's scores is taken."""


def squares_along(weights: FFNWeights, hidden: Callable[[], Tensor], gradients_tD: Tensor) -> Tensor:
    """[F]: squares of gradients along every row of the down projection, in units of whole gradients anywhere."""
    down_FD = weights.down.detach()
    along_F = (gradients_tD.to(down_FD.dtype) @ down_FD.T).float().square().sum(0)
    return along_F * down_FD.shape[1] / down_FD.float().square().sum(1).clamp_min(1e-30)


class ScoreMethod(Method[ConfigT]):
    """Base of such methods; what they fit besides is :meth:`fit`."""

    calibration_tokens, dial_tokens = 1024, 4096

    fitted = True

    @property
    def neuron_gradients(self) -> NeuronGradients | None:
        """See :class:`Method`."""
        return squares_along if self.by_direction else None

    @property
    def by_direction(self) -> bool:
        """Whether scores count the down rows; if not, the direction in which a neuron pushes is nothing to them."""
        return True

    def fit(self, router: ScoreRouter, seen: Activations) -> None:
        """Give a router what it has besides its sensitivities."""

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`. Sensitivities make layers comparable, or where there are none, their middles."""
        assert activations is not None
        routers = [ffn.router for ffn in ffns if isinstance(ffn.router, ScoreRouter)]
        middles: list[float] = []
        for router, seen in zip(routers, activations, strict=True):
            self.fit(router, seen)
            known = seen.sensitivity is not None
            if seen.sensitivity is None:
                router.sensitivity.fill_(1.0)
            elif self.by_direction and seen.neuron_gradients_F is not None:
                # Half what the gradient is along the neuron's row, half what it is along any: gradients of some
                # thousand tokens tell no more.
                squares_F = (seen.neuron_gradients_F + seen.sensitivity**2) / 2
                squares_E = squares_F.unflatten(0, (router.n_experts, -1)).mean(-1)
                router.sensitivity.copy_(squares_E.sqrt().clamp_min(NOTHING))
            else:
                router.sensitivity.fill_(max(seen.sensitivity, NOTHING))
            logits = router(seen.inputs_TD[:: max(1, len(seen.inputs_TD) // SAMPLED)]).margins
            assert logits is not None
            some = logits[logits > math.log(NOTHING) + 1]
            middle = float(some.median()) if len(some) else 0.0
            if not known:
                router.sensitivity.mul_(math.exp(-middle))
                middle = 0.0
            middles.append(middle)
        for router in routers:
            router.sensitivity.mul_(math.exp(-sum(middles) / len(middles)))
