"""What a grouping is: an order of the neurons in which experts are contiguous and equally large."""

from __future__ import annotations

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Calibration:
    """What one FFN of the dense model saw and did on T calibration tokens, padding left out.

    Attributes:
        inputs_TD: its inputs.
        hidden_TF: what entered its down projection.
        sensitivity: root mean square, over the tokens, of the loss's gradient with respect to its output; it makes
            the contributions of different layers comparable. None where the calibration data had no labels.
        token_sensitivity_T: norm of that gradient for each token, where the data had one label per row: what reaches
            the label differs between tokens then (most passes through the first, in an encoder), and their inputs
            tell. None for a label per token, where it differs by how surprising the next token is, which no router
            could know.
    """

    inputs_TD: Tensor
    hidden_TF: Tensor
    sensitivity: float | None = None
    token_sensitivity_T: Tensor | None = None

    def permuted(self, grouping: NeuronGrouping) -> Calibration:
        """The same for neurons in a new order."""
        return replace(self, hidden_TF=self.hidden_TF[:, grouping.permutation.to(self.hidden_TF.device)])

    def contributions(self, weights: FFNWeights) -> Tensor:
        """What each neuron adds to the output, ``|activation| * norm of its row of the down projection``: [T, F]."""
        norms_F = weights.down.detach().float().norm(dim=1)
        return self.hidden_TF.abs().float() * norms_F.to(self.hidden_TF.device)

    def fit(self, targets_TK: Tensor) -> LinearFit:
        """Ridge regression of ``targets`` on the inputs, with an intercept."""
        ones = torch.ones(len(self.inputs_TD), 1, device=self.inputs_TD.device)
        design = torch.cat([self.inputs_TD.float(), ones], dim=1)
        gram = design.T @ design
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram)
        return LinearFit(torch.cholesky_solve(design.T @ targets_TK, factor), factor)


RIDGE = 1e-2
"""Weight of the ridge penalty, as a share of the mean square of an input."""


@dataclass(frozen=True)
class LinearFit:
    """``targets ~ [inputs, 1] @ coefficients``.

    Attributes:
        coefficients: [D + 1, K], the intercept last.
        factor: [D + 1, D + 1], Cholesky factor of the inputs' Gram matrix with its ridge.
    """

    coefficients: Tensor
    factor: Tensor

    @property
    def weight(self) -> Tensor:
        """[K, D]."""
        return self.coefficients[:-1].T

    @property
    def bias(self) -> Tensor:
        """[K]."""
        return self.coefficients[-1]

    def features(self) -> Tensor:
        """Rows with the predictions' inner products over all tokens, but for the ridge: [K, D + 1], not [K, T]."""
        return self.coefficients.T @ self.factor


class GroupingFn(Protocol):
    """The one signature of every grouping. Deterministic for a seed, whatever the global random state."""

    def __call__(
        self, weights: FFNWeights, expert_size: int, *, seed: int, calibration: Calibration | None = None
    ) -> NeuronGrouping:
        """Group the neurons of one FFN.

        Args:
            weights: the FFN, on any device and in any floating dtype.
            expert_size: neurons per expert; divides F.
            seed: of the grouping's own random generator.
            calibration: what the FFN did on calibration tokens, where the grouping asks for it.
        """
        ...


def require_calibration(calibration: Calibration | None, grouping: str) -> Calibration:
    """ConfigError where a grouping that looks at activations got none."""
    if calibration is None:
        raise ConfigError(
            f"grouping={grouping!r} needs calibration data: lte.sparsify(model, config, calibration=batches), "
            "with batches of model inputs"
        )
    return calibration


def check_divisible(d_ff: int, expert_size: int) -> None:
    """Raise ConfigError, listing sizes that fit, unless ``expert_size`` divides ``d_ff``."""
    if expert_size < 1 or d_ff % expert_size:
        fitting = [size for size in range(4, 129) if d_ff % size == 0] or [
            size for size in range(1, d_ff + 1) if d_ff % size == 0
        ]
        raise ConfigError(
            f"d_ff={d_ff} is not divisible by expert_size={expert_size}; choose one of {', '.join(map(str, fitting))}"
        )
