"""Neurons picked by low-rank approximations of the matrices before the activation, truncated where inputs are small."""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import MethodConfig, register_method
from lte.grouping import Activations
from lte.methods.scores import ScoreMethod
from lte.nn import Router, RouterCost, ScoreRouter, SparseFFN
from lte.nn.router import ROUTER_DTYPE
from lte.ops.reference import neuron_scores

RIDGE = 1e-2
"""Added to the inputs' second moments, as a share of their mean: columns that calibration hardly saw used count too."""


class SVDConfig(MethodConfig):
    """Single neurons, picked by a truncated SVD of the gate and up matrices.

    Attributes:
        rank: of every approximation.
    """

    method = "svd"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"
    rank: Annotated[int, pydantic.Field(ge=1)] = 64


class SVDRouter(ScoreRouter):
    """Guesses a neuron's output as ``|act(g x) u x| * norm(down row)`` with g and u of low rank.

    Args:
        d_model, d_ff, n_experts: of the FFN.
        rank: of g and of u.
        device: as for :class:`ScoreRouter`.
    """

    def __init__(
        self, d_model: int, d_ff: int, n_experts: int, *, rank: int, device: torch.device | None = None
    ) -> None:
        super().__init__(n_experts, device=device)
        self.shapes = {"inner": (min(rank, d_model), d_model), "outer": (d_ff, min(rank, d_model))}
        self.names: tuple[str, ...] = ()

    def attach(self, ffn: SparseFFN) -> None:
        """See :meth:`Router.attach`. A plain FFN has no gate to approximate."""
        super().attach(ffn)
        self.names = ("gate", "up") if {"gate", "gate_up"} & set(ffn.roles) else ("up",)
        for name in self.names:
            for part, shape in self.shapes.items():
                empty = torch.empty(shape, device=self.sensitivity.device, dtype=ROUTER_DTYPE)
                self.register_parameter(f"{name}_{part}", nn.Parameter(empty, requires_grad=False))

    @torch.no_grad()
    def approximate(self, inputs_TD: Tensor) -> None:
        """Take the best approximations, in the mean square over these inputs."""
        x_TD = inputs_TD.float()
        moments_DD = x_TD.T @ x_TD / len(x_TD)
        moments_DD.diagonal().add_(RIDGE * float(moments_DD.diagonal().mean()) + 1e-12)
        root_DD = torch.linalg.cholesky(moments_DD)
        weights = self.ffn.weights()
        for name in self.names:
            seen_FD = getattr(weights, name).detach().float() @ root_DD
            directions_DR = torch.linalg.eigh(seen_FD.T @ seen_FD).eigenvectors[:, -len(self._part(name, "inner")) :]
            self._part(name, "outer").copy_(seen_FD @ directions_DR)
            self._part(name, "inner").copy_(torch.linalg.solve_triangular(root_DD.T, directions_DR, upper=True).T)

    def _part(self, name: str, part: str) -> nn.Parameter:
        return self.get_parameter(f"{name}_{part}")

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        weights = self.ffn.weights()
        inner = {name: x.float() @ self._part(name, "inner").T for name in self.names}
        products = {name: inner[name] @ self._part(name, "outer").T for name in self.names}
        return neuron_scores(products["up"], products.get("gate"), self.unit_scores(), weights)

    def cost(self) -> RouterCost:
        """Of two thin products per matrix."""
        size = sum(p.numel() for p in self.parameters())
        return RouterCost(size, size * ROUTER_DTYPE.itemsize, size)


@register_method(SVDConfig)
class SVD(ScoreMethod[SVDConfig]):
    """Truncation-aware SVDs as of arXiv 2603.14110, of the up matrix too, for any activation: docs/methods.md."""

    trains = False
    decides = "gate and up of low rank"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        d_ff = n_experts * self.config.expert_size
        return SVDRouter(d_model, d_ff, n_experts, rank=self.config.rank, device=like.device)

    def fit(self, router: ScoreRouter, seen: Activations) -> None:
        """See :class:`ScoreMethod`."""
        assert isinstance(router, SVDRouter)
        router.approximate(seen.inputs_TD)
