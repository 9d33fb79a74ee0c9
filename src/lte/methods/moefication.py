"""MoEfication: experts of co-clustered neurons, the k with the largest sums of activations run (Zhang et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.grouping import Activations
from lte.methods.predictors import fit_predictor
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import FixedShareRouter, PredictorRouter, Router, RouterCost, SparseFFN


class MoEficationConfig(FixedShareConfig):
    """Experts of neurons whose weights are alike, as many for every token.

    Meant for models with a ReLU; with another activation, sizes of activations stand for them.

    Attributes:
        router: ``oracle`` knows the sums of the experts' activations (the paper's ground-truth selection) and saves
            nothing; ``mlp`` is trained to predict them.
        rank: width of the middle layer of ``mlp``.
    """

    method = "moefication"

    grouping: str = "kmeans"
    router: Literal["oracle", "mlp"] = "mlp"
    rank: Annotated[int, pydantic.Field(ge=1)] = 128


class ActivationSumRouter(FixedShareRouter):
    """Scores experts by the sum of the sizes of their activations."""

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return _sums(self.ffn.hidden(x).detach(), self.n_experts)

    def cost(self) -> RouterCost:
        """Nothing: an oracle is not charged for what it looks at."""
        return RouterCost(0, 0, 0)


@register_method(MoEficationConfig)
class MoEfication(UnlearnedMethod[MoEficationConfig]):
    """Clusters by weights, and predicts which clusters will be active."""

    decides = "a predictor of experts' sums"

    @property
    def kernels(self) -> str:  # type: ignore[override]
        """See :class:`Method`."""
        return "none, an oracle" if self.config.router == "oracle" else super().kernels

    @property
    def needs_calibration(self) -> str | None:
        """See :class:`Method`."""
        of_router = "router='mlp'" if self.config.router == "mlp" else None
        return super().needs_calibration or of_router

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        config = self.config
        if config.router == "oracle":
            return ActivationSumRouter(n_experts, sparsity=config.sparsity)
        return PredictorRouter(d_model, n_experts, sparsity=config.sparsity, rank=config.rank, device=like.device)

    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        if self.config.router == "oracle":
            return
        assert activations is not None
        for ffn, seen in zip(ffns, activations, strict=True):
            router = ffn.router
            assert isinstance(router, PredictorRouter)
            fit_predictor(router, seen, partial(_shares, n_experts=router.n_experts), _divergence, generator)


def _sums(hidden: Tensor, n_experts: int) -> Tensor:
    return hidden.float().abs().unflatten(-1, (n_experts, -1)).sum(-1)


def _shares(hidden_tF: Tensor, n_experts: int) -> Tensor:
    sums_tE = _sums(hidden_tF, n_experts)
    return sums_tE / sums_tE.sum(-1, keepdim=True).clamp_min(1e-20)


def _divergence(logits_tE: Tensor, shares_tE: Tensor) -> Tensor:
    return -(shares_tE * logits_tE.log_softmax(-1)).sum(-1).mean()
