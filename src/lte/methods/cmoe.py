"""CMoE: experts that always run, and one neuron that speaks for each of the others (Pei et al., 2025); not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.grouping import Activations, balanced_kmeans
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import ROUTER_DTYPE, FixedShareRouter, Router, RouterCost, SparseFFN, largest
from lte.ops import ACTIVATIONS


class CMoEConfig(FixedShareConfig):
    """Experts of neurons that are active together, as many for every token, some of them for all.

    Attributes:
        shared: share of the experts that run which always do: those of the neurons that are active most often.
        active: neurons that count as active at every token, the largest; None for a tenth of all. The paper's is 10.
    """

    method = "cmoe"

    grouping: str = "none"
    shared: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    active: Annotated[int, pydantic.Field(ge=1)] | None = None


class RepresentativeRouter(FixedShareRouter):
    """Shared experts come first, and always run; another is as large as the activation of its representative neuron.

    Args:
        n_experts, sparsity: as for :class:`FixedShareRouter`.
        shared: of :class:`CMoEConfig`.
        device: of :attr:`representatives`, the numbers of those neurons.
    """

    def __init__(self, n_experts: int, *, sparsity: float, shared: float, device: torch.device | None = None) -> None:
        super().__init__(n_experts, sparsity=sparsity)
        self.n_shared = round(self.k * shared)
        numbers = torch.zeros(n_experts - self.n_shared, device=device, dtype=ROUTER_DTYPE)
        self.representatives = nn.Parameter(numbers, requires_grad=False)

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        weights, rows = self.ffn.weights(), self.representatives.long()

        def product(matrix: Tensor, bias: Tensor | None) -> Tensor:
            return nn.functional.linear(x, matrix[rows], None if bias is None else bias[rows]).detach().float()

        hidden, act = product(weights.up, weights.up_bias), ACTIVATIONS[weights.activation]
        hidden = act(hidden) if weights.gate is None else act(product(weights.gate, weights.gate_bias)) * hidden
        always = hidden.new_full((*hidden.shape[:-1], self.n_shared), torch.inf)
        return torch.cat([always, hidden.abs()], dim=-1)

    def cost(self) -> RouterCost:
        """Rows of the representatives."""
        weights, count = self.ffn.weights(), self.representatives.numel()
        matrices = [matrix for matrix in (weights.gate, weights.up) if matrix is not None]
        read = sum(count * matrix.shape[1] * matrix.element_size() for matrix in matrices)
        return RouterCost(count * weights.d_model * len(matrices), read + self.representatives.nbytes, count)


@register_method(CMoEConfig)
class CMoE(UnlearnedMethod[CMoEConfig]):
    """Groups by what is active together, and lets a member speak for each group."""

    decides = "one neuron for each expert"
    trains = False
    fitted = True

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        c = self.config
        return RepresentativeRouter(n_experts, sparsity=c.sparsity, shared=c.shared, device=like.device)

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        assert activations is not None
        for ffn, seen in zip(ffns, activations, strict=True):
            assert isinstance(ffn.router, RepresentativeRouter)
            size, router = self.config.expert_size, ffn.router
            d_ff = ffn.weights().d_ff
            active = min(self.config.active or round(0.1 * d_ff), d_ff)
            active_FT = torch.cat([largest(hidden_tF.abs(), active) for _, (_, hidden_tF) in seen.chunks()]).T.float()
            often = active_FT.sum(1).argsort(descending=True, stable=True)
            shared, others = often[: router.n_shared * size], often[router.n_shared * size :].sort().values
            labels = balanced_kmeans(active_FT[others], size, seed=self.config.seed + ffn.layer_index, name="activity")
            members_ES = labels.to(others.device).argsort(stable=True).unflatten(0, (-1, size))
            profiles_EST = active_FT[others][members_ES]
            away_ES = (profiles_EST - profiles_EST.mean(1, keepdim=True)).square().sum(-1)
            ffn.weights().permute_(torch.cat([shared, others[members_ES].flatten()]).cpu())
            first = torch.arange(len(members_ES), device=away_ES.device) * size + len(shared)
            router.representatives.copy_(first + away_ES.argmin(1))
