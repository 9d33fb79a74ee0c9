"""COUNTDOWN: a neuron's coefficient in the down projection says whether it counts (arXiv 2505.17701)."""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import LayerwiseConfig, register_method
from lte.errors import ConfigError
from lte.methods.scores import ScoreMethod
from lte.nn import HalfForm, Router, RouterCost, ScoreRouter, SparseFFN
from lte.ops import fast_linear


class CountdownConfig(LayerwiseConfig):
    """Single neurons of gated FFNs, by what multiplies their rows of the down projection.

    Attributes:
        direct: False looks at the up projection alone (M-COUNTDOWN, which needs no predictor); True at the coefficient
            itself (D-COUNTDOWN's ideal), which an oracle knows and which saves nothing.
    """

    method = "countdown"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"
    direct: bool = False


class CoefficientRouter(ScoreRouter):
    """Guesses a neuron's output by its coefficient, or the half of it that needs no activation.

    Args:
        n_experts, device: as for :class:`ScoreRouter`.
        direct: of :class:`CountdownConfig`.
    """

    def __init__(self, n_experts: int, *, direct: bool, device: torch.device | None = None) -> None:
        super().__init__(n_experts, device=device)
        self.direct = direct

    def attach(self, ffn: SparseFFN) -> None:
        """See :meth:`Router.attach`."""
        super().attach(ffn)
        if not {"gate", "gate_up"} & set(ffn.roles):
            raise ConfigError("method='countdown' is for gated FFNs, and this model's have no gate; cats serves both")

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return self._scores_of(self.ffn.hidden(x) if self.direct else self._ups(x))

    def _ups(self, x: Tensor) -> Tensor:
        weights = self.ffn.weights()
        return fast_linear(x, weights.up, weights.up_bias)

    def _scores_of(self, coefficients: Tensor) -> Tensor:
        return coefficients.detach().float().abs() * self.neuron_sensitivity()

    def form(self) -> HalfForm | None:
        """See :meth:`Router.form`."""
        if self.direct or self.n_experts < self.ffn.weights().d_ff:
            return None
        return HalfForm("up", self._decide)

    def _decide(self, x_TD: Tensor) -> Tensor:
        ups_TF = self._ups(x_TD)
        return ups_TF.where(self.decide_by(self._scores_of(ups_TF)).mask, 0.0)

    def cost(self) -> RouterCost:
        """All of the up projection is read, also the rows of neurons that do not run; an oracle is not charged."""
        up = self.ffn.weights().up
        size = self.sensitivity.numel()
        if self.direct:
            return RouterCost(0, 0, size)
        return RouterCost(up.numel(), up.nbytes, size, of_ffn=self.form() is not None)


@register_method(CountdownConfig)
class Countdown(ScoreMethod[CountdownConfig]):
    """Looks at the up projection."""

    trains = False
    decides = "the up projection"
    families = "gated"

    @property
    def kernels(self) -> str:  # type: ignore[override]
        """See :class:`Method`."""
        return "none, an oracle" if self.config.direct else "go on from there"

    @property
    def learns(self) -> bool:
        """See :class:`Method`."""
        return False

    @property
    def by_direction(self) -> bool:
        """See :class:`ScoreMethod`: a coefficient has no direction."""
        return False

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return CoefficientRouter(n_experts, direct=self.config.direct, device=like.device)
