"""Balanced k-means: time on a large layer, and cost against an exact-assignment reference on a small one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from lte.grouping.kmeans import balanced_kmeans, clustering_cost, normalise_rows

LARGE = (11008, 4096, 32)
SMALL = (768, 256, 32)
"""Rows, width and cluster size; the large one is the gate of LLaMA-7B."""

_REFERENCE = "k-means-constrained"
_REFERENCE_MAX_ROWS = 1536


def bench_grouping(
    *,
    sizes: Sequence[tuple[int, int, int]] = (LARGE, SMALL),
    seeds: Sequence[int] = (0, 1, 2),
    reference: bool = True,
) -> list[dict[str, Any]]:
    """Rows with wall and CPU seconds, the cost, and its ratio to that of the package ``k-means-constrained``.

    The ratio is None where the reference did not run, and the row says why. Layers too large for the reference
    are measured on random rows with the first seed only, the others on random and planted rows with every seed.

    Args:
        sizes: (rows, width, cluster size) of each layer.
        seeds: of the features and of the clustering.
        reference: whether to run the reference.
    """
    rows = []
    for shape in sizes:
        large = shape[0] > _REFERENCE_MAX_ROWS
        status = _reference_status(shape) if reference else "not asked for"
        for kind in ("random",) if large else ("random", "planted"):
            for seed in seeds[:1] if large else seeds:
                rows.append(_measure(kind, _features(kind, shape, seed), shape, seed, status))
    return rows


def _reference_status(shape: tuple[int, int, int]) -> str:
    """Name and version of the reference, or why it is left out."""
    if shape[0] > _REFERENCE_MAX_ROWS:
        return "too slow at this size"
    try:
        return f"{_REFERENCE} {version(_REFERENCE)}"
    except PackageNotFoundError:
        return f"not installed: pip install {_REFERENCE}"


def _features(kind: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    n, width, size = shape
    generator = torch.Generator().manual_seed(seed)
    noise_ND = torch.randn(n, width, generator=generator)
    if kind == "random":
        return normalise_rows(noise_ND)
    centres = torch.randn(n // size, width, generator=generator)
    return normalise_rows(centres[torch.randint(n // size, (n,), generator=generator)] + noise_ND)


def _measure(kind: str, features_ND: Tensor, shape: tuple[int, int, int], seed: int, reference: str) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    labels_N = balanced_kmeans(features_ND, shape[2], seed=seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    cost = clustering_cost(features_ND, labels_N)
    compared = reference.startswith(_REFERENCE)
    return {
        "features": kind,
        "rows x width": f"{shape[0]} x {shape[1]}",
        "clusters": shape[0] // shape[2],
        "seed": seed,
        "seconds": wall,
        "cpu_seconds": cpu,
        "cost": cost,
        "cost_ratio": cost / _reference_cost(features_ND, shape, seed) if compared else None,
        "reference": reference,
        "threads": torch.get_num_threads(),
    }


def _reference_cost(features_ND: Tensor, shape: tuple[int, int, int], seed: int) -> float:
    from k_means_constrained import KMeansConstrained

    n, _, size = shape
    model = KMeansConstrained(n_clusters=n // size, size_min=size, size_max=size, random_state=seed)
    fitted = model.fit(features_ND.numpy())
    return clustering_cost(features_ND, torch.tensor(fitted.labels_.tolist()))
