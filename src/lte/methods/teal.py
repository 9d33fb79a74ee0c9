"""TEAL: small inputs of every matrix are left out, by thresholds from quantiles (Liu et al., ICLR 2025)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from lte.activations import BlockRun, runs_of_blocks
from lte.config import FixedShareConfig, register_method
from lte.families import blocks_of
from lte.grouping import Activations
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import (
    ROUTER_DTYPE,
    LookingRouter,
    Router,
    RouterCost,
    Routing,
    SparseFFN,
    Thresholded,
    threshold_inputs,
)

SAMPLED = 2**22
"""Most values from which a quantile is taken."""


STEP, MOST = 0.1, 0.9
"""By which a matrix's share grows, and the largest there is."""


class TEALConfig(FixedShareConfig):
    """Columns of gate and up whose input is small, and rows of down whose coefficient is.

    An FFN's budget is divided between the inputs of gate and up, who share theirs, and those of down: of
    :data:`DIVISIONS` the one that changes the FFN's output least. As published, with ``attention``, small inputs of the
    attention's projections are left out too, ``sparsity`` is of all linear layers of a block, and its matrices get
    their shares greedily: of all, the one next whose inputs, left out in :data:`STEP` more, change the block's output
    least for what that saves.

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

GREEDY = 256
"""Tokens on which a block's matrices are compared."""


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
            for block, ffn in _sparse_blocks(model):
                threshold_inputs(block, skip={id(module) for module in ffn.modules()})

    @torch.no_grad()
    def fit_blocks(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """See :class:`Method`."""
        if not self.config.attention:
            return
        sparse = dict(_sparse_blocks(model))
        for run in runs_of_blocks(model, blocks_of(model), batches):
            if run.block not in sparse:
                continue
            parts, target = _parts(run.block, sparse[run.block]), self.config.sparsity
            shares = _divide(parts, run, target) if self.config.divide else [target] * len(parts)
            for part in parts:
                part.set(torch.zeros(()), 0.0)
            for part, share in zip(parts, shares, strict=True):
                part.set(_quantile(_seen([part], run)[0], share), share)

    @staticmethod
    def _set(router: MagnitudeRouter, ffn: SparseFFN, x_TD: Tensor, of_inputs: float, of_down: float) -> None:
        """Thresholds; the second is of what comes of the inputs that the first leaves."""
        router.taus[0] = _quantile(x_TD.abs(), of_inputs)
        hidden = [ffn.hidden(router.inputs(x_tD)).abs() for x_tD in x_TD.split(512)]
        router.taus[1] = _quantile(torch.cat(hidden), of_down)


@dataclass(frozen=True)
class _Part:
    """A threshold, of one projection or of gate and up.

    Attributes:
        weights: number of weights behind it.
        watched: the module that gets the inputs.
        read: of what the module gets, the sizes that are compared with the threshold.
        set: takes the threshold, and the share that it leaves out.
    """

    weights: int
    watched: nn.Module
    read: Callable[[Tensor], Tensor]
    set: Callable[[Tensor, float], None]


def _parts(block: nn.Module, ffn: SparseFFN) -> list[_Part]:
    """Of a block, in the order in which they run."""
    router, weights = ffn.router, ffn.weights()
    assert isinstance(router, MagnitudeRouter)

    def set_tau(index: int, tau: Tensor, share: float) -> None:
        router.taus[index] = tau

    first = weights.up.numel() * (1 if weights.gate is None else 2)
    others = [module for module in block.modules() if isinstance(module, Thresholded)]
    return [
        *(_Part(module.weight.numel(), module, Tensor.abs, module.leave_out) for module in others),
        _Part(first, ffn, Tensor.abs, partial(set_tau, 0)),
        _Part(weights.down.numel(), ffn, lambda x: ffn.hidden(router.inputs(x)).abs(), partial(set_tau, 1)),
    ]


def _seen(parts: Sequence[_Part], run: BlockRun, tokens: int | None = None) -> list[Tensor]:
    """What every threshold is compared with."""
    found: list[list[Tensor]] = [[] for _ in parts]
    with ExitStack() as stack:
        for part, values in zip(parts, found, strict=True):

            def keep(
                module: nn.Module, args: tuple[Tensor, ...], part: _Part = part, to: list[Tensor] = values
            ) -> None:
                to.append(run.without_padding(part.read(args[0].detach()).flatten(0, -2)))

            stack.enter_context(part.watched.register_forward_pre_hook(keep))
        run(tokens)
    return [torch.cat(values) for values in found]


def _divide(parts: Sequence[_Part], run: BlockRun, sparsity: float) -> list[float]:
    """The share of every part, step by step; all are whole at the beginning."""
    wanted, seen = run(GREEDY), _seen(parts, run, GREEDY)
    steps = round(MOST / STEP)
    taus = [[torch.zeros(()), *(_quantile(values, STEP * step) for step in range(1, steps + 1))] for values in seen]
    at, left = [0] * len(parts), sparsity * sum(part.weights for part in parts)
    shares = [0.0] * len(parts)

    def error() -> float:
        return float((run(GREEDY) - wanted).float().square().mean())

    def costs(part: int) -> float:
        """What the next step of a part changes, for every weight that it saves."""
        parts[part].set(taus[part][at[part] + 1], 0.0)
        more = error() - before
        parts[part].set(taus[part][at[part]], 0.0)
        return more / parts[part].weights

    before = 0.0
    known = {part: costs(part) for part in range(len(parts))}
    fresh = set(known)
    while left > 0 and known:
        # What others cost has grown since, if anything: the cheapest is asked anew, until it stays the cheapest.
        while (chosen := min(known, key=known.__getitem__)) not in fresh:
            known[chosen] = costs(chosen)
            fresh.add(chosen)
        step = min(STEP, left / parts[chosen].weights)
        at[chosen] += 1
        parts[chosen].set(taus[chosen][at[chosen]], 0.0)
        if at[chosen] == steps:
            del known[chosen]
        shares[chosen] += step
        left -= step * parts[chosen].weights
        before, fresh = error(), set()
    return shares


def _sparse_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, SparseFFN]]:
    for block in blocks_of(model):
        ffn = next((module for module in block.modules() if isinstance(module, SparseFFN)), None)
        if ffn is not None:
            yield block, ffn


def _quantile(values: Tensor, share: float) -> Tensor:
    every, step = values.float().flatten(), -(-values.numel() // SAMPLED)
    while math.gcd(step, values.shape[-1]) > 1:  # or some columns would never be seen
        step += 1
    every = every[::step]
    return every.kthvalue(max(1, min(len(every), round(share * len(every))))).values
