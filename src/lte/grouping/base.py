"""What a grouping is: an order of the neurons in which experts are contiguous and equally large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lte.errors import ConfigError
from lte.ops.weights import FFNWeights


@dataclass(frozen=True)
class NeuronGrouping:
    """A permutation of an FFN's neurons; expert ``e`` is positions ``e*expert_size .. (e+1)*expert_size-1``.

    Attributes:
        permutation: [F] long, new position -> old neuron.
        expert_size: neurons per expert.
    """

    permutation: Tensor
    expert_size: int

    def __post_init__(self) -> None:
        check_divisible(self.permutation.numel(), self.expert_size)
        order = self.permutation.sort().values
        if not torch.equal(order, torch.arange(order.numel(), device=order.device)):
            raise ConfigError("a grouping must name every neuron exactly once")

    @classmethod
    def from_labels(cls, labels: Tensor, expert_size: int) -> NeuronGrouping:
        """From one expert number per neuron, [F] long; inside an expert neurons keep their order."""
        counts = torch.bincount(labels)
        if not torch.all(counts == expert_size):
            raise ConfigError(f"experts must hold exactly {expert_size} neurons, got sizes {counts.tolist()}")
        return cls(torch.argsort(labels, stable=True), expert_size)

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.permutation.numel() // self.expert_size


Chunk = tuple[Tensor, Tensor]
"""Of some tokens: FFN inputs [t, D] and what entered the down projection [t, F], both float32."""

CHUNK_TOKENS = 512
"""Tokens whose hidden values are held at once."""

PROFILE_VALUES = 2**26
"""Most numbers that the profiles of one FFN's neurons over tokens may hold."""


NeuronGradients = Callable[[FFNWeights, Callable[[], Tensor], Tensor], Tensor]
"""Of some tokens: (weights, what computes the hidden values [t, F], gradients of the loss with respect to the FFN's
output [t, D]) -> [F], summed over the tokens. Padding has gradients of zero."""


@dataclass(frozen=True)
class Activations:
    """What one FFN of the dense model saw on T calibration tokens, padding left out.

    Only its inputs are kept. What it does with them is computed again where it is asked for, some tokens at a time and
    with its neurons in the order they are in by then, so that memory does not grow with the width of the FFN.

    Attributes:
        inputs_TD: its inputs, in the model's dtype and on its device.
        hidden_of: [t, D] -> [t, F], what enters its down projection.
        sensitivity: root mean square, over the tokens, of the loss's gradient with respect to its output; it makes
            the contributions of different layers comparable. None where the calibration data had no labels.
        token_sensitivity_T: norm of that gradient for each token, where the data had one label per row: what reaches
            the label differs between tokens then (most passes through the first, in an encoder), and their inputs
            tell. None for a label per token, where it differs by how surprising the next token is, which no router
            could know.
        neuron_gradients_F: mean over the tokens of what the method measures of the loss's gradients for every neuron,
            see :attr:`lte.config.Method.neuron_gradients`. None where it measures nothing, or there were no labels.
    """

    inputs_TD: Tensor
    hidden_of: Callable[[Tensor], Tensor]
    sensitivity: float | None = None
    token_sensitivity_T: Tensor | None = None
    neuron_gradients_F: Tensor | None = None

    @torch.no_grad()
    def chunks(self, step: int = 1) -> Iterator[tuple[slice, Chunk]]:
        """All tokens, or every ``step``-th, some at a time: which they are, and what the FFN saw and did."""
        size = CHUNK_TOKENS * step
        for start in range(0, len(self.inputs_TD), size):
            part = slice(start, min(start + size, len(self.inputs_TD)), step)
            x_tD = self.inputs_TD[part]
            yield part, (x_tD.float(), self.hidden_of(x_tD).float())

    def profiles(self, weights: FFNWeights) -> Tensor:
        """What each neuron adds to the output, token by token: [F, t]; of as many tokens as fit the memory."""
        step = -(-len(self.inputs_TD) * weights.d_ff // PROFILE_VALUES)
        return torch.cat([contributions(hidden_tF, weights) for _, (_, hidden_tF) in self.chunks(step)]).T

    @torch.no_grad()
    def fit(
        self,
        targets: Callable[[slice, Tensor], Tensor],
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> LinearFit:
        """Ridge regression of ``targets`` on the inputs, with an intercept.

        Args:
            targets: (which tokens, their hidden values [t, F]) -> [t, K].
            features: of the inputs, [t, D] -> [t, R]; the inputs themselves if None.

        Every feature is penalised by its own variance: a few dimensions of a language model are larger than the rest
        by orders of magnitude, and a penalty by the mean would leave nothing of the others.
        """
        features = features or torch.Tensor.float
        count = len(self.inputs_TD)
        totals = [features(x_tD).sum(0, dtype=torch.float64) for _, (x_tD, _) in self._inputs()]
        mean_D = (torch.stack(totals).sum(0) / count).float()
        width = len(mean_D)
        gram_DD = mean_D.new_zeros(width, width)
        cross_DK, target_K = None, mean_D.new_zeros(())
        for part, (x_tD, hidden_tF) in self.chunks():
            centred_tD, targets_tK = features(x_tD) - mean_D, targets(part, hidden_tF)
            gram_DD.addmm_(centred_tD.T, centred_tD)
            if cross_DK is None:
                cross_DK = mean_D.new_zeros(width, targets_tK.shape[1])
            cross_DK.addmm_(centred_tD.T, targets_tK)
            target_K = target_K + targets_tK.sum(0) / count
        variance_D = gram_DD.diagonal()
        variance_D.add_(RIDGE * variance_D + 1e-6 * variance_D.mean() + torch.finfo(torch.float32).tiny)
        factor_DD = torch.linalg.cholesky(gram_DD)
        assert cross_DK is not None
        weight_DK = torch.cholesky_solve(cross_DK, factor_DD)
        return LinearFit(weight_DK.T, target_K - mean_D @ weight_DK, target_K, factor_DD, count)

    def _inputs(self) -> Iterator[tuple[slice, Chunk]]:
        """As :meth:`chunks`, without computing what the FFN did."""
        for start in range(0, len(self.inputs_TD), CHUNK_TOKENS):
            x_tD = self.inputs_TD[start : start + CHUNK_TOKENS].float()
            yield slice(start, start + len(x_tD)), (x_tD, x_tD)


def contributions(hidden_tF: Tensor, weights: FFNWeights) -> Tensor:
    """What each neuron adds to the output, ``|activation| * norm of its row of the down projection``: [t, F]."""
    norms_F = weights.down.detach().float().norm(dim=1)
    return hidden_tF.abs().float().mul_(norms_F.to(hidden_tF.device))


RIDGE = 1e-2
"""Weight of the ridge penalty, as a share of a feature's variance."""


@dataclass(frozen=True)
class LinearFit:
    """``targets ~ features @ weight.T + bias``.

    Attributes:
        weight: [K, D].
        bias: [K].
        mean: [K], of the targets.
        factor: [D, D], Cholesky factor of the centred features' Gram matrix with its ridge.
        tokens: number of tokens.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    factor: Tensor
    tokens: int

    def features(self) -> Tensor:
        """Rows with the predictions' inner products over all tokens, but for the ridge: [K, D + 1], not [K, T]."""
        features_KD = self.weight.new_empty(len(self.weight), self.factor.shape[1] + 1)
        torch.mm(self.weight, self.factor, out=features_KD[:, :-1])
        torch.mul(self.mean, self.tokens**0.5, out=features_KD[:, -1])
        return features_KD


class GroupingFn(Protocol):
    """The one signature of every grouping. Deterministic for a seed, whatever the global random state."""

    def __call__(
        self, weights: FFNWeights, expert_size: int, *, seed: int, activations: Activations | None = None
    ) -> NeuronGrouping:
        """Group the neurons of one FFN.

        Args:
            weights: the FFN, on any device and in any floating dtype.
            expert_size: neurons per expert; divides F.
            seed: of the grouping's own random generator.
            activations: what the FFN did on calibration tokens, where the grouping asks for it.
        """
        ...


def require_activations(activations: Activations | None, grouping: str) -> Activations:
    """ConfigError where a grouping that looks at activations got none."""
    if activations is None:
        raise ConfigError(
            f"grouping={grouping!r} needs calibration data: lte.sparsify(model, config, calibration=batches), "
            "with batches of model inputs"
        )
    return activations


def check_divisible(d_ff: int, expert_size: int) -> None:
    """Raise ConfigError, listing sizes that fit, unless ``expert_size`` divides ``d_ff``."""
    if expert_size < 1 or d_ff % expert_size:
        fitting = [size for size in range(4, 129) if d_ff % size == 0] or [
            size for size in range(1, d_ff + 1) if d_ff % size == 0
        ]
        raise ConfigError(
            f"d_ff={d_ff} is not divisible by expert_size={expert_size}; choose one of {', '.join(map(str, fitting))}"
        )
