"""A router that knows nothing: drawn at random and left so, the model adapts to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.grouping import Activations
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import ROUTER_DTYPE, FixedShareRouter, Router, RouterCost, SparseFFN


class RandomRouterConfig(FixedShareConfig):
    """Experts by a random projection of the input, as many for every token."""

    method = "random-router"


class RandomRouter(FixedShareRouter):
    """Scores by fixed random directions, all of one length; inputs of one direction meet the same experts."""

    def __init__(self, d_model: int, n_experts: int, *, sparsity: float, device: torch.device | None = None) -> None:
        super().__init__(n_experts, sparsity=sparsity)
        empty = torch.empty(n_experts, d_model, device=device, dtype=ROUTER_DTYPE)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return x.float() @ self.weight.T

    def cost(self) -> RouterCost:
        """Of one product."""
        return RouterCost.of_layers(self.parameters())


@register_method(RandomRouterConfig)
class RandomRouting(UnlearnedMethod[RandomRouterConfig]):
    """Draws, and never looks."""

    decides = "chance"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return RandomRouter(d_model, n_experts, sparsity=self.config.sparsity, device=like.device)

    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        for ffn in ffns:
            assert isinstance(ffn.router, RandomRouter)
            drawn = torch.randn(ffn.router.weight.shape, generator=generator)
            with torch.no_grad():
                ffn.router.weight.copy_(drawn / drawn.norm(dim=1, keepdim=True))
