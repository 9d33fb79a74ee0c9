"""Groupings by what neurons do: those that contribute to the same tokens share an expert."""

from __future__ import annotations

from torch import Tensor

from lte.grouping.base import Activations, NeuronGrouping, check_divisible, contributions, require_activations
from lte.grouping.kmeans import balanced_kmeans, normalise_rows
from lte.ops.weights import FFNWeights


def group_coactivation(
    weights: FFNWeights, expert_size: int, *, seed: int, activations: Activations | None = None
) -> NeuronGrouping:
    """Balanced k-means on the neurons' profiles: what each adds to the output, token by token.

    A profile is :func:`lte.grouping.base.contributions`, L2-normalised. ConfigError without calibration data.
    """
    return _cluster(require_activations(activations, "coactivation").profiles(weights), expert_size, seed)


def group_predicted(
    weights: FFNWeights, expert_size: int, *, seed: int, activations: Activations | None = None
) -> NeuronGrouping:
    """Co-activation as a router can see it: profiles are first replaced by their linear prediction from the input.

    What a linear router cannot tell from the FFN's input is noise to it, so neurons are grouped by the part it can
    tell. It also makes the features D + 1 wide instead of as many as there are tokens.
    """
    activations = require_activations(activations, "predicted")
    # Nothing is kept by name: what a fit holds is as large as the features.
    return _cluster(
        activations.fit(lambda _, hidden_tF: contributions(hidden_tF, weights)).features(), expert_size, seed
    )


def _cluster(features: Tensor, expert_size: int, seed: int) -> NeuronGrouping:
    check_divisible(len(features), expert_size)
    features = normalise_rows(features)
    labels_F = balanced_kmeans(features, expert_size, seed=seed, name="activations")
    return NeuronGrouping.from_labels(labels_F.cpu(), expert_size)
