"""Which neurons form which expert: one file per grouping, one signature (:class:`GroupingFn`)."""

from lte.errors import ConfigError
from lte.grouping.base import Activations, GroupingFn, LinearFit, NeuronGradients, NeuronGrouping, check_divisible
from lte.grouping.coactivation import group_coactivation, group_predicted
from lte.grouping.kmeans import balanced_kmeans, group_kmeans, group_kmeans_all
from lte.grouping.random import group_none, group_random

GROUPINGS: dict[str, GroupingFn] = {
    "kmeans": group_kmeans,
    "kmeans-all": group_kmeans_all,
    "coactivation": group_coactivation,
    "predicted": group_predicted,
    "random": group_random,
    "none": group_none,
}
"""Name -> grouping."""

_NEED_ACTIVATIONS = {"coactivation", "predicted"}


def get_grouping(name: str) -> GroupingFn:
    """The grouping of that name; ConfigError lists the known ones."""
    if name not in GROUPINGS:
        raise ConfigError(f"unknown grouping {name!r}; known groupings: {', '.join(sorted(GROUPINGS))}")
    return GROUPINGS[name]


def needs_activations(name: str) -> bool:
    """Whether a grouping asks for calibration activations."""
    return name in _NEED_ACTIVATIONS


def register_grouping(name: str, fn: GroupingFn, *, activations: bool = False) -> None:
    """Add a grouping, or replace one; ``activations`` says that it needs calibration data."""
    GROUPINGS[name] = fn
    _NEED_ACTIVATIONS.discard(name)
    if activations:
        _NEED_ACTIVATIONS.add(name)


__all__ = [
    "GROUPINGS",
    "Activations",
    "GroupingFn",
    "LinearFit",
    "NeuronGradients",
    "NeuronGrouping",
    "balanced_kmeans",
    "check_divisible",
    "get_grouping",
    "group_coactivation",
    "group_kmeans",
    "group_kmeans_all",
    "group_none",
    "group_predicted",
    "group_random",
    "needs_activations",
    "register_grouping",
]
