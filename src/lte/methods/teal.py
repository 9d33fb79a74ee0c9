"""TEAL: small inputs of every matrix are left out, by thresholds from quantiles (Liu et al., ICLR 2025)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.grouping import Activations
from lte.methods.block_inputs import (
    MOST,
    Part,
    attention_parts,
    fit_blocks,
    quantile,
    threshold_attention,
)
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import (
    ROUTER_DTYPE,
    LookingRouter,
    Router,
    RouterCost,
    Routing,
    SparseFFN,
)


class TEALConfig(FixedShareConfig):
    """Columns of gate and up whose input is small, and rows of down whose coefficient is.

    An FFN's budget is divided between the inputs of gate and up, who share theirs, and those of down: of
    :data:`DIVISIONS` the one that changes the FFN's output least. As published, with ``attention``, small inputs of the
    attention's projections are left out too, ``sparsity`` is of all linear layers of a block, and its matrices get
    their shares greedily, see :func:`~lte.methods.block_inputs.divide`.

    Attributes:
        divide: False gives every matrix the same sparsity.
        attention: whether the attention's projections take part.
    """

    method = "teal"

    expert_size: Annotated[int, pydantic.Field(ge=1, le=1)] = 1
    grouping: str = "none"
    divide: bool = True
    attention: bool = False

    @pydantic.model_validator(mode="after")
    def _reached(self) -> TEALConfig:
        if self.attention and self.divide and self.sparsity > MOST:
            raise ValueError(f"sparsity={self.sparsity}: no matrix gets more than {MOST}; give less, or divide=False")
        return self


DIVISIONS = (-0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
"""How much sparser down may be than the whole FFN."""

SEARCHED = 1024
"""Tokens on which divisions are compared."""


class InputsRouter(LookingRouter):
    """Leaves out entries of an input before the first matrices, and neurons before the last. Sub-classes say which."""

    uses_threshold = False

    @abstractmethod
    def keeps(self, x: Tensor) -> Tensor:
        """Which entries of an input count: [..., D] bool."""

    @abstractmethod
    def keeps_hidden(self, hidden: Tensor) -> Tensor:
        """Which neurons count, from what enters the down projection: [..., F] bool."""

    def inputs(self, x: Tensor) -> Tensor:
        """See :meth:`Router.inputs`."""
        return x.where(self.keeps(x), 0.0)

    def forward(self, x: Tensor) -> Routing:
        """Decide for inputs of shape [..., D]."""
        keeps = self.keeps(x)
        mask = self.keeps_hidden(self.ffn.hidden(x.where(keeps, 0.0)))
        before = 1 if self.ffn.weights().gate is None else 2
        used = (before * keeps.float().mean(-1, keepdim=True) + mask) / (before + 1)
        return Routing(mask.float(), mask, used=used)

    def cost(self) -> RouterCost:
        """Nothing: what is looked at is there."""
        return RouterCost(0, 0, sum(p.numel() for p in self.parameters()))


class MagnitudeRouter(InputsRouter):
    """``abs(x) > tau_x`` before the first matrices, ``abs(h) > tau_h`` before the last.

    Args:
        n_experts: number of neurons.
        device: of :attr:`taus`, the two thresholds.
    """

    def __init__(self, n_experts: int, *, device: torch.device | None = None) -> None:
        super().__init__(n_experts)
        self.taus = nn.Parameter(torch.zeros(2, device=device, dtype=ROUTER_DTYPE), requires_grad=False)

    def keeps(self, x: Tensor) -> Tensor:
        """See :class:`InputsRouter`."""
        return x.detach().abs() > self.taus[0]

    def keeps_hidden(self, hidden: Tensor) -> Tensor:
        """See :class:`InputsRouter`."""
        return hidden.detach().abs() > self.taus[1]


@register_method(TEALConfig)
class TEAL(UnlearnedMethod[TEALConfig]):
    """Takes quantiles."""

    decides = "sizes of matrices' inputs"
    kernels = "none: columns, not neurons"
    trains, fitted = False, True
    calibration_tokens = 4096

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return MagnitudeRouter(n_experts, device=like.device)

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        if self.config.attention:
            return  # fit_blocks finds all of a block together
        assert activations is not None
        for ffn, seen in zip(ffns, activations, strict=True):
            router = ffn.router
            assert isinstance(router, MagnitudeRouter)
            x_TD, target = seen.inputs_TD, self.config.sparsity
            some_tD = x_TD[:: -(-len(x_TD) // SEARCHED)]
            wanted_tD = ffn.project_down(ffn.hidden(some_tD)).float()
            before = 1 if ffn.weights().gate is None else 2
            best = (float("inf"), (target, target))
            for more in DIVISIONS if self.config.divide else (0.0,):
                of_down, of_inputs = target + more, target - more / before
                if 0 <= of_inputs < 1 and 0 <= of_down < 1:
                    self._set(router, ffn, some_tD, of_inputs, of_down)
                    hidden_tF = ffn.hidden(router.inputs(some_tD))
                    got_tD = ffn.project_down(hidden_tF * router.keeps_hidden(hidden_tF)).float()
                    best = min(best, (float((got_tD - wanted_tD).square().mean()), (of_inputs, of_down)))
            self._set(router, ffn, x_TD, *best[1])

    def install(self, model: nn.Module) -> None:
        """See :class:`Method`."""
        if self.config.attention:
            threshold_attention(model)

    def fit_blocks(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """See :class:`Method`."""
        if self.config.attention:
            fit_blocks(model, batches, _parts, self.config.sparsity, self.config.divide)

    @staticmethod
    def _set(router: MagnitudeRouter, ffn: SparseFFN, x_TD: Tensor, of_inputs: float, of_down: float) -> None:
        """Thresholds; the second is of what comes of the inputs that the first leaves."""
        router.taus[0] = quantile(x_TD.abs(), of_inputs)
        hidden = [ffn.hidden(router.inputs(x_tD)).abs() for x_tD in x_TD.split(512)]
        router.taus[1] = quantile(torch.cat(hidden), of_down)


def _parts(block: nn.Module, ffn: SparseFFN) -> list[Part]:
    """Of a block, in the order in which they run."""
    router, weights = ffn.router, ffn.weights()
    assert isinstance(router, MagnitudeRouter)

    def set_tau(index: int, tau: Tensor, share: float) -> None:
        router.taus[index] = tau

    first = weights.up.numel() * (1 if weights.gate is None else 2)
    return [
        *attention_parts(block),
        Part(first, ffn, Tensor.abs, partial(set_tau, 0)),
        Part(weights.down.numel(), ffn, lambda x: ffn.hidden(router.inputs(x)).abs(), partial(set_tau, 1)),
    ]
