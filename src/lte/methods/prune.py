"""Structured pruning: the neurons that count least are taken out of the weights, the same ones for every token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, TypeVar

import pydantic
import torch
from torch import Tensor, nn

from lte.config import FixedShareConfig, register_method
from lte.errors import ConfigError
from lte.grouping import Activations, NeuronGradients
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import ROUTER_DTYPE, ConstantForm, Router, RouterCost, Routing, SparseFFN, largest, sparse_ffns
from lte.ops import FFNWeights


class PruneConfig(FixedShareConfig):
    """Settings of them all.

    Attributes:
        kept: neurons that are left of every sparse FFN; what pruning found, and what the saved matrices have.
    """

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"
    kept: tuple[Annotated[int, pydantic.Field(ge=1)], ...] | None = None


class PruneMagnitudeConfig(PruneConfig):
    """Of every layer, the neurons with the smallest weights: by the norm of all that belong to one."""

    method = "prune-magnitude"


class PruneWandaConfig(PruneConfig):
    """Of every layer, those with small activations and down rows: ``norm(h_i) * sum(abs(d_i))`` (Sun et al., 2024)."""

    method = "prune-wanda"


class PruneTaylorConfig(PruneConfig):
    """Of every layer, those whose loss would change least, to the first order (Molchanov et al., 2019).

    The importance is the mean over the tokens of ``(h_i * dL/dh_i) ** 2``.
    """

    method = "prune-taylor"


class PruneFLAPConfig(PruneConfig):
    """Those whose outputs hardly change, ``var(h_i) * norm(d_i) ** 2``, compared over all layers (An et al., 2024).

    Attributes:
        compensate: the mean of what is left out goes into the bias of the down projection, made where there is none.
    """

    method = "prune-flap"

    compensate: bool = True


ConfigT = TypeVar("ConfigT", bound=PruneConfig)


class ConstantRouter(Router):
    """The same experts for every token; the others' weights are gone.

    Args:
        n_experts: number of experts E there were.
        device: of :attr:`keeps`, [E], 1 for experts that are left and 0 for others.
    """

    uses_threshold = decides = False

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

    def form(self) -> ConstantForm:
        """See :meth:`Router.form`."""
        return ConstantForm()

    def cost(self) -> RouterCost:
        """Nothing is decided."""
        return RouterCost(0, 0, 0)


class Prune(UnlearnedMethod[ConfigT]):
    """Base: sub-classes say how much each neuron counts."""

    decides = "nothing: pruned for good"
    kernels = "run what is left"
    calibration_tokens = 4096
    over_layers = False
    """Whether neurons of different layers are compared."""

    @abstractmethod
    def importance(self, ffn: SparseFFN, seen: Activations | None) -> Tensor:
        """[F], how much each neuron of an FFN counts."""

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        return ConstantRouter(n_experts, device=like.device)

    @torch.no_grad()
    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        every: list[Tensor] = []
        for ffn, seen in zip(ffns, [None] * len(ffns) if activations is None else activations, strict=True):
            importance_F = self.importance(ffn, seen).float()
            every.append(importance_F.unflatten(0, (ffn.router.n_experts, -1)).sum(1))
        if self.over_layers:
            every = [(scores - scores.mean()) / scores.std().clamp_min(1e-30) for scores in every]
            kept = list(_largest(torch.cat(every), self.config.sparsity).split([len(scores) for scores in every]))
            # No layer is left without any.
            kept = [mask | (scores == scores.max()) for mask, scores in zip(kept, every, strict=True)]
        else:
            kept = [_largest(scores, self.config.sparsity) for scores in every]
        for ffn, mask in zip(ffns, kept, strict=True):
            assert isinstance(ffn.router, ConstantRouter)
            ffn.router.keeps.copy_(mask)
            neurons = mask.repeat_interleave(ffn.weights().d_ff // len(mask))
            self.before_removal(ffn, ~neurons)
            ffn.keep(neurons.nonzero().flatten())

    def before_removal(self, ffn: SparseFFN, removed: Tensor) -> None:
        """Called with the neurons that go, [F] bool, while they are still there."""

    def settled(self, ffns: Sequence[SparseFFN]) -> ConfigT:
        """See :class:`Method`."""
        return self.config.model_copy(update={"kept": tuple(ffn.weights().d_ff for ffn in ffns)})

    def install(self, model: nn.Module) -> None:
        """See :class:`Method`."""
        if self.config.kept is None:
            return
        ffns = sparse_ffns(model)
        if len(self.config.kept) != len(ffns):
            raise ConfigError(f"kept={list(self.config.kept)} is for {len(self.config.kept)} FFNs, not {len(ffns)}")
        for ffn, count in zip(ffns, self.config.kept, strict=True):
            device = ffn.weights().up.device
            ffn.keep(torch.arange(min(count, ffn.weights().d_ff), device=device))


@register_method(PruneMagnitudeConfig)
class PruneMagnitude(Prune[PruneMagnitudeConfig]):
    """By weights."""

    def importance(self, ffn: SparseFFN, seen: Activations | None) -> Tensor:
        """See :class:`Prune`."""
        weights = ffn.weights()
        matrices = [w for w in (weights.up, weights.gate, weights.down) if w is not None]
        return torch.stack([w.float().square().sum(1) for w in matrices]).sum(0).sqrt()


@register_method(PruneWandaConfig)
class PruneWanda(Prune[PruneWandaConfig]):
    """By weights and activations."""

    fitted = True

    def importance(self, ffn: SparseFFN, seen: Activations | None) -> Tensor:
        """See :class:`Prune`."""
        assert seen is not None
        squares_F = torch.stack([hidden_tF.square().sum(0) for _, (_, hidden_tF) in seen.chunks()]).sum(0)
        return squares_F.sqrt() * ffn.weights().down.float().abs().sum(1)


def taylor(weights: FFNWeights, hidden: Callable[[], Tensor], gradients_tD: Tensor) -> Tensor:
    """[F]: squares of what the loss changes by, to the first order, without the neuron."""
    of_hidden_tF = gradients_tD.to(weights.down.dtype) @ weights.down.detach().T
    return (hidden().float() * of_hidden_tF.float()).square().sum(0)


@register_method(PruneTaylorConfig)
class PruneTaylor(Prune[PruneTaylorConfig]):
    """By gradients."""

    fitted, looks_at_loss = True, True

    @property
    def neuron_gradients(self) -> NeuronGradients:
        """See :class:`Method`."""
        return taylor

    def importance(self, ffn: SparseFFN, seen: Activations | None) -> Tensor:
        """See :class:`Prune`."""
        assert seen is not None
        if seen.neuron_gradients_F is None:
            raise ConfigError("method='prune-taylor' needs calibration batches with labels: it looks at the loss")
        return seen.neuron_gradients_F


@register_method(PruneFLAPConfig)
class PruneFLAP(Prune[PruneFLAPConfig]):
    """By what changes."""

    over_layers, fitted = True, True

    def __init__(self, config: PruneFLAPConfig) -> None:
        super().__init__(config)
        self._means: dict[int, Tensor] = {}

    def importance(self, ffn: SparseFFN, seen: Activations | None) -> Tensor:
        """See :class:`Prune`."""
        assert seen is not None
        hidden_TF = torch.cat([hidden_tF for _, (_, hidden_tF) in seen.chunks()])
        self._means[ffn.layer_index] = hidden_TF.mean(0)
        return hidden_TF.var(0) * ffn.weights().down.float().square().sum(1)

    def before_removal(self, ffn: SparseFFN, removed: Tensor) -> None:
        """See :class:`Prune`."""
        if self.config.compensate:
            lost_D = (self._means[ffn.layer_index] * removed) @ ffn.weights().down.float()
            ffn.down_bias().data += lost_D

    def install(self, model: nn.Module) -> None:
        """See :class:`Method`."""
        super().install(model)
        if self.config.compensate and self.config.kept is not None:
            for ffn in sparse_ffns(model):
                ffn.down_bias()


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """Which of some scores are among the largest, as many as are to stay; bool."""
    return largest(scores, max(1, round(len(scores) * (1 - sparsity))))
