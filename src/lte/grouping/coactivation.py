"""Co-activation grouping: neurons that contribute to the same tokens share an expert."""

from __future__ import annotations

from torch import Tensor

from lte.errors import ConfigError
from lte.grouping.base import NeuronGrouping, check_divisible
from lte.grouping.kmeans import balanced_kmeans, normalise_rows
from lte.ops.weights import FFNWeights


def group_coactivation(
    weights: FFNWeights, expert_size: int, *, seed: int, activations: Tensor | None = None
) -> NeuronGrouping:
    """Balanced k-means on the neurons' profiles: what each adds to the output, token by token.

    A neuron's profile is ``|activation| * norm of its row of the down projection`` over the calibration tokens,
    L2-normalised. Raises ConfigError if ``activations`` [T, F] is None.
    """
    check_divisible(weights.d_ff, expert_size)
    if activations is None:
        raise ConfigError(
            "grouping='coactivation' needs calibration data: lte.sparsify(model, config, calibration=batches), "
            "with batches of model inputs"
        )
    contribution_TF = activations.abs().float() * weights.down.detach().float().norm(dim=1).to(activations.device)
    labels_F = balanced_kmeans(normalise_rows(contribution_TF.T), expert_size, seed=seed, name="activations")
    return NeuronGrouping.from_labels(labels_F.cpu(), expert_size)
