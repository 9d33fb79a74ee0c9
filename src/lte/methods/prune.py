"""Structured pruning: the same neurons are left out for every token, those that count least."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar

import pydantic
import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.grouping import Calibration
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import ROUTER_DTYPE, Router, RouterCost, Routing, SparseFFN, largest


class PruneConfig(FixedShareConfig):
    """Settings of them all."""

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"


class PruneMagnitudeConfig(PruneConfig):
    """Of every layer, the neurons with the smallest weights: by the norm of all that belong to one."""

    method = "prune-magnitude"


class PruneWandaConfig(PruneConfig):
    """Of every layer, those with small activations and down rows: ``norm(h_i) * sum(abs(d_i))`` (Sun et al., 2024)."""

    method = "prune-wanda"


class PruneFLAPConfig(PruneConfig):
    """Those whose outputs hardly change, ``var(h_i) * norm(d_i) ** 2``, compared over all layers (An et al., 2024).

    FLAP also puts the mean of what is left out into a bias. Most FFNs have none, and none is added here.
    """

    method = "prune-flap"


ConfigT = TypeVar("ConfigT", bound=PruneConfig)


class ConstantRouter(Router):
    """The same experts for every token.

    Args:
        n_experts: number of experts E.
        device: of :attr:`keeps`, [E], 1 for experts that run and 0 for others.
    """

    uses_threshold = False

    def __init__(self, n_experts: int, *, device: torch.device | None = None) -> None:
        super().__init__(n_experts)
        self.keeps = nn.Parameter(torch.ones(n_experts, device=device, dtype=ROUTER_DTYPE), requires_grad=False)

    def freeze(self) -> None:
        """See :meth:`Router.freeze`."""
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Routing:
        """The mask, for inputs of shape [..., D]."""
        keeps = self.keeps.expand(*x.shape[:-1], self.n_experts)
        return Routing(keeps, keeps > 0.5)

    def cost(self) -> RouterCost:
        """Nothing is decided."""
        return RouterCost(0, 0, 0)


class Prune(UnlearnedMethod[ConfigT]):
    """Base: sub-classes say how much each neuron counts."""

    decides = "nothing: pruned for good"
    calibration_tokens = 4096
    over_layers = False
    """Whether neurons of different layers are compared."""

    @abstractmethod
    def importance(self, ffn: SparseFFN, seen: Calibration | None) -> Tensor:
        """[F], how much each neuron of an FFN counts."""

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return ConstantRouter(n_experts, device=like.device)

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], calibration: Iterator[Calibration] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        every: list[Tensor] = []
        for ffn, seen in zip(ffns, [None] * len(ffns) if calibration is None else calibration, strict=True):
            importance_F = self.importance(ffn, seen).float()
            every.append(importance_F.unflatten(0, (ffn.router.n_experts, -1)).sum(1))
        if self.over_layers:
            every = [(scores - scores.mean()) / scores.std().clamp_min(1e-30) for scores in every]
            kept = _largest(torch.cat(every), self.config.sparsity).split([len(scores) for scores in every])
        else:
            kept = [_largest(scores, self.config.sparsity) for scores in every]
        for ffn, mask in zip(ffns, kept, strict=True):
            assert isinstance(ffn.router, ConstantRouter)
            ffn.router.keeps.copy_(mask)


@register_method(PruneMagnitudeConfig)
class PruneMagnitude(Prune[PruneMagnitudeConfig]):
    """By weights."""

    def importance(self, ffn: SparseFFN, seen: Calibration | None) -> Tensor:
        """See :class:`Prune`."""
        weights = ffn.weights()
        matrices = [w for w in (weights.up, weights.gate, weights.down) if w is not None]
        return torch.stack([w.float().square().sum(1) for w in matrices]).sum(0).sqrt()


@register_method(PruneWandaConfig)
class PruneWanda(Prune[PruneWandaConfig]):
    """By weights and activations."""

    fitted = True

    def importance(self, ffn: SparseFFN, seen: Calibration | None) -> Tensor:
        """See :class:`Prune`."""
        assert seen is not None
        squares_F = torch.stack([hidden_tF.square().sum(0) for _, (_, hidden_tF) in seen.chunks()]).sum(0)
        return squares_F.sqrt() * ffn.weights().down.float().abs().sum(1)


@register_method(PruneFLAPConfig)
class PruneFLAP(Prune[PruneFLAPConfig]):
    """By what changes."""

    over_layers, fitted = True, True

    def importance(self, ffn: SparseFFN, seen: Calibration | None) -> Tensor:
        """See :class:`Prune`."""
        assert seen is not None
        hidden_TF = torch.cat([hidden_tF for _, (_, hidden_tF) in seen.chunks()])
        return hidden_TF.var(0) * ffn.weights().down.float().square().sum(1)


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """Which of some scores are among the largest, as many as are to stay; bool."""
    return largest(scores, max(1, round(len(scores) * (1 - sparsity))))
