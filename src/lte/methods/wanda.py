"""Wanda: single weights are left out, by their size times that of their inputs (Sun et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.errors import ConfigError
from lte.grouping import Activations
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import ROUTER_DTYPE, ConstantForm, LookingRouter, Router, RouterCost, Routing, SparseFFN, largest


class WandaConfig(FixedShareConfig):
    """Weights of the FFNs alone that count least for their output, ``abs(w_ij) * norm(x_j)``, become zeros.

    Norms are over calibration tokens, layer by layer, of the model as pruned so far. The published method does the same
    to attention.

    Attributes:
        pattern: ``unstructured``: the same share of every output's weights; ``2:4`` and ``4:8``: half of every 4 or 8
            neighbouring inputs' weights.
    """

    method = "wanda"

    expert_size: Annotated[int, pydantic.Field(ge=1, le=1)] = 1
    grouping: str = "none"
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"

    @pydantic.model_validator(mode="after")
    def _half(self) -> WandaConfig:
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise ValueError(f"pattern={self.pattern} leaves out half, not sparsity={self.sparsity}; give 0.5")
        return self


class ZerosRouter(LookingRouter):
    """All neurons run; of their weights the share :attr:`used` is not zero.

    Args:
        n_experts: number of neurons.
        device: of :attr:`used`, [F].
    """

    uses_threshold = False

    def __init__(self, n_experts: int, *, device: torch.device | None = None) -> None:
        super().__init__(n_experts)
        self.used = nn.Parameter(torch.ones(n_experts, device=device, dtype=ROUTER_DTYPE), requires_grad=False)

    def forward(self, x: Tensor) -> Routing:
        """For inputs of shape [..., D]."""
        used = self.used.expand(*x.shape[:-1], self.n_experts)
        every = torch.ones_like(used)
        return Routing(every, every > 0, used=used)

    def form(self) -> ConstantForm:
        """See :meth:`Router.form`."""
        return ConstantForm()

    def cost(self) -> RouterCost:
        """Nothing is decided."""
        return RouterCost(0, 0, 0)


@register_method(WandaConfig)
class Wanda(UnlearnedMethod[WandaConfig]):
    """Puts zeros into the weights."""

    decides = "nothing: zeros for good"
    kernels = "none: single weights"
    calibration_tokens = 4096
    trains, trainable, fitted = False, False, True
    in_sequence = True

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return ZerosRouter(n_experts, device=like.device)

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        assert activations is not None
        for ffn in ffns:  # before anything is changed
            self._check_widths(ffn)
        taken: list[tuple[Tensor, Tensor, Tensor]] = []
        try:
            for ffn, seen in zip(ffns, activations, strict=True):
                self._prune(ffn, seen, taken)
        except BaseException:
            for matrix, gone, values in taken:
                matrix[gone] = values.to(matrix.device)
            raise

    def _prune(self, ffn: SparseFFN, seen: Activations, taken: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Put the zeros in; what stood there goes to ``taken``, should a later layer fail."""
        parts = [(x_tD.square().sum(0), h_tF.square().sum(0)) for _, (x_tD, h_tF) in seen.chunks()]
        norms_D, norms_F = (torch.stack(each).sum(0).sqrt() for each in zip(*parts, strict=True))
        weights = ffn.weights()
        first = [self.keeps(w.abs() * norms_D) for w in (weights.gate, weights.up) if w is not None]
        keeps = [*first, self.keeps(weights.down.T.abs() * norms_F).T]
        matrices = [w.data for w in (weights.gate, weights.up, weights.down) if w is not None]
        for matrix, mask in zip(matrices, keeps, strict=True):
            taken.append((matrix, ~mask, matrix[~mask].cpu()))
            matrix.mul_(mask)
        assert isinstance(ffn.router, ZerosRouter)
        ffn.router.used.copy_(torch.stack([mask.float().mean(1) for mask in keeps]).mean(0))

    def _check_widths(self, ffn: SparseFFN) -> None:
        weights, of = ffn.weights(), 1
        if self.config.pattern != "unstructured":
            of = int(self.config.pattern.split(":")[1])
        for inputs in (weights.d_model, weights.d_ff):
            if inputs % of:
                raise ConfigError(f"pattern={self.config.pattern} needs inputs that {of} divides, not {inputs}")

    def keeps(self, scores: Tensor) -> Tensor:
        """Which weights stay: [outputs, inputs] -> the same, bool."""
        inputs = scores.shape[1]
        if self.config.pattern == "unstructured":
            return largest(scores, max(1, round(inputs * (1 - self.config.sparsity))))
        kept, of = map(int, self.config.pattern.split(":"))
        return largest(scores.unflatten(1, (-1, of)), kept).flatten(1)
